"""Pydantic's validation errors in this project's words."""

from __future__ import annotations

import pydantic

from train.settings.errors import did_you_mean, unknown_setting

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def in_words(error: dict, model: type[pydantic.BaseModel]) -> str:
    """What is wrong, what is allowed and what was given, for one item of `ValidationError.errors()` of `model`."""
    kind, got, context = error["type"], repr(error["input"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_setting(error["loc"][-1], _fields_beside(model, error["loc"]))
    if kind == "missing":
        field = _fields_beside(model, error["loc"]).get(error["loc"][-1])
        return f"must be set: {field.description}" if field is not None and field.description else "must be set"
    if kind in EXPECTED:
        return f"must be {EXPECTED[kind]}, got {got}"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be one of {', '.join(choices)}, got {got}{did_you_mean(error['input'], choices)}"
    if kind in BOUNDS:
        words, limit = BOUNDS[kind]
        return f"must be {words} {context[limit]:g}, got {got}"
    if kind == "value_error":
        return str(context["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {got}"


def _fields_beside(model: type[pydantic.BaseModel], location: tuple) -> dict:
    """Fields of the section that the error's field lies in."""
    for name in location[:-1]:
        inner = model.model_fields[name].annotation if name in model.model_fields else None
        if not isinstance(inner, type) or not issubclass(inner, pydantic.BaseModel):
            return {}
        model = inner
    return model.model_fields
