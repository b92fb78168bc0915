"""What is wrong with a configuration: every problem at once, each with the place where it was written."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

FieldPath = tuple[str | int, ...]

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True)
class Problem:
    """One thing to correct: `where` (file and line, or `--set`), the dotted `field`, and what is wrong with it."""

    where: str
    field: str
    text: str

    def __str__(self) -> str:
        place = " ".join(part for part in (self.where, self.field) if part)
        if not place:
            return self.text
        return f"{place} {self.text}" if self.text.startswith("must ") else f"{place}: {self.text}"


class SettingsError(ValueError):
    """A run that cannot start as it was described; its text is one line per problem."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def unknown_setting(name: str, names: Iterable[str]) -> str:
    """The text of a problem: a name that no setting has, with the closest one or else all that there are."""
    names = list(names)
    few = f"; allowed are {', '.join(names)}" if 0 < len(names) < 20 else "; --help lists all"
    return f"unknown setting{did_you_mean(name, names) or few}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def field_problems(error, model: type, values: Any, elsewhere: Mapping[str, str] | None = None) -> dict[FieldPath, str]:
    """Pydantic's validation error in this project's words: for every field what is wrong, allowed and given.

    Args:
        error: the `pydantic.ValidationError` of `model` over `values`.
        elsewhere: name -> the section that has a setting of this name.
    """
    result: dict[FieldPath, str] = {}
    for item in error.errors():
        path, annotation, section = _place(model, item["loc"])
        if len(path) == len(item["loc"]):
            text = _text(item, annotation, section, (elsewhere or {}) if len(path) == 1 else {})
        else:  # the rest is pydantic's name for one of several types, all of which are refused
            text = _refused(annotation, _value_at(values, path))
        result.setdefault(path, text)
    return result


def _place(model: type, location: tuple) -> tuple[FieldPath, Any, type]:
    """Path, type and section of the field that an error is about; the path ends where several types are allowed."""
    annotation, section, path = model, model, ()
    for part in location:
        branches = _branches(annotation)
        if len(branches) > 1:
            break
        annotation = branches[0] if branches else None
        if hasattr(annotation, "model_fields"):
            section = annotation
            annotation = section.model_fields[part].annotation if part in section.model_fields else None
        else:
            annotation = typing.get_args(annotation)[-1] if typing.get_args(annotation) else None
        path += (part,)
    return path, annotation, section


def _branches(annotation: Any) -> list:
    """The types that a field may have, `None` left out."""
    if typing.get_origin(annotation) is Annotated:
        return _branches(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [branch for part in typing.get_args(annotation) for branch in _branches(part)]
    return [] if annotation is types.NoneType else [annotation]


def _value_at(values: Any, path: FieldPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _text(item: dict, annotation: Any, section: type, elsewhere: Mapping[str, str]) -> str:
    kind, got, context = item["type"], repr(item["input"]), item.get("ctx", {})
    name = item["loc"][-1] if item["loc"] else ""
    if kind == "extra_forbidden":
        if name in getattr(section, "not_here", {}):
            return f"cannot be set here: {section.not_here[name]}"
        if name in elsewhere:
            return f"unknown setting here; it belongs to section {elsewhere[name]}"
        return unknown_setting(name, section.model_fields)
    if kind == "missing":
        return f"must be set: {section.model_fields[name].description}"
    if kind.endswith("_type") or kind in ("literal_error", "int_from_float"):
        return _refused(annotation, item["input"])
    if kind == "string_too_short":
        return f"must be text that is not empty, got {got}"
    if bound := context.keys() & BOUNDS.keys():
        [limit] = bound
        return f"must be {BOUNDS[limit]} {context[limit]:g}, got {got}"
    if kind == "value_error":
        return f"{context['error']}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, got {got}"


def _refused(annotation: Any, value: Any) -> str:
    """`must be ..., got ...` for a value that has none of the allowed types."""
    branches = _branches(annotation)
    choices = [c for b in branches if typing.get_origin(b) is Literal for c in typing.get_args(b)]
    kinds = [typing.get_origin(b) or b for b in branches]
    words = [WORDS.get(kind, "a mapping of settings") for kind in kinds if kind is not Literal]
    if choices:
        words.append(("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices)))
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"must be {' or '.join(dict.fromkeys(words))}, got {value!r}{hint}"
