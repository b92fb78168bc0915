"""The settings of a run as text for `--help`, made from the same classes that check them."""

from __future__ import annotations

import textwrap
import typing
from dataclasses import fields
from typing import Literal

import pydantic

from lrsa import LRSAConfig
from train.settings.schema import LRSA, SECTIONS


def sections_help() -> str:
    """Every section with its settings, their defaults and meanings."""
    parts = [f"{name}:\n{lrsa_help() if name == 'lrsa' else settings_help(model)}" for name, model in SECTIONS.items()]
    return "settings, as `name (default): meaning`; those of train are TRL's SFTConfig:\n\n" + "\n".join(parts)


def settings_help(model: type[pydantic.BaseModel], prefix: str = "") -> str:
    """The settings of one section; of a list of settings those that the section itself has not."""
    text = ""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            text += settings_help(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
            meaning = f"{field.description} One of {', '.join(map(str, choices))}." if choices else field.description
            text += _entry(prefix + name, "required" if field.is_required() else _shown(default), meaning)
            listed = next((part for part in _parts(field.annotation) if hasattr(part, "model_fields")), None)
            for own in listed.model_fields.keys() - model.model_fields.keys() if listed else ():
                text += _entry(f"{prefix}{name}.N.{own}", "null", listed.model_fields[own].description)
    return text


def _parts(annotation: object) -> list:
    """A type and all types that it is made of."""
    return [annotation, *(inner for part in typing.get_args(annotation) for inner in _parts(part))]


def lrsa_help() -> str:
    """The settings of section lrsa."""
    return "".join(_entry(field.name, _shown(field.default), LRSA[field.name]) for field in fields(LRSAConfig))


def _shown(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return repr(list(default) if isinstance(default, tuple) else default)


def _entry(name: str, default: str, meaning: str) -> str:
    line = textwrap.TextWrapper(
        118, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )
    return line.fill(f"{name} ({default}): {meaning}") + "\n"
