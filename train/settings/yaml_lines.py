"""YAML text to plain values plus the line of every field, so that a message can point at the place to correct.

Scalars follow YAML 1.2: `1e-4` is a number and `no` is text (in YAML 1.1, which PyYAML speaks by default, `1e-4` is
text and `save_strategy: no` is False). A key that is written twice is a problem; PyYAML keeps the last in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import yaml

FieldPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
        r"|^\.(?:nan|NaN|NAN)$"
    ),
    "-+0123456789.",
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), "<")


@dataclass
class YamlText:
    """Values, the line (from 1) of every field by its path, and problems as `(line, path, text)`."""

    values: object = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[tuple[int, FieldPath, str]] = field(default_factory=list)


def parse(text: str) -> YamlText:
    """Read one YAML document; syntax errors and duplicate keys become problems, nothing is raised."""
    result = YamlText()
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        result.problems = [(line, (), f"not valid YAML: the character {chr(error.character)!r} is not allowed")]
        return result
    try:
        node = loader.get_single_node()
        if node is not None:
            _record_lines(node, (), result)
            result.values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = "a tab cannot start a token; indent with spaces" if "'\\t'" in str(error.problem) else error.problem
        result.problems = [(mark.line + 1 if mark else 1, (), f"not valid YAML: {reason or error.context}")]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        result.problems = [(1, (), f"not valid YAML: {' '.join(str(error).split())}")]
    finally:
        loader.dispose()
    return result


def _record_lines(node: yaml.Node, path: FieldPath, result: YamlText) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (*path, key.value)
            line = key.start_mark.line + 1
            if name in result.lines and key.value != "<<":
                result.problems.append((line, name, f"written twice, first on line {result.lines[name]}; keep one"))
            else:
                result.lines[name] = line
            _record_lines(value, name, result)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            result.lines[(*path, index)] = item.start_mark.line + 1
            _record_lines(item, (*path, index), result)
