"""Checks the `train` section against TRL's `SFTConfig`: names, simple types, choices, names of other sections."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from functools import cache

from train.settings.errors import did_you_mean

OWNED_ELSEWHERE = {
    "model_init_kwargs": "the model is described in section model",
    "trust_remote_code": "set model.trust_remote_code",
    "chat_template_path": "set model.chat_template",
    "eos_token": "rows come tokenized from section data",
    "pad_token": "rows come tokenized from section data",
    "dataset_text_field": "rows come tokenized from section data; set data.columns",
    "dataset_kwargs": "rows come tokenized from section data",
    "completion_only_loss": "section data decides which tokens are trained",
    "assistant_only_loss": "section data decides which tokens are trained",
    "truncation_mode": "rows are never cut; set data.context_length",
    "padding_free": "set packing: true",
    "parallelism_config": "set parallel.sp_size",
    "fsdp": "use train.deepspeed",
    "fsdp_config": "use train.deepspeed",
    "local_rank": "the launcher passes it",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "launch/publish.py sends a finished run, checked and without paths of this machine",
    ),
    "do_train": "launch/train.py always trains",
    "do_eval": "set eval.enabled",
    "do_predict": "set eval.enabled",
}

# Values that SFTConfig takes but that fail late or mean nothing: (smallest allowed, whether it is allowed itself).
SMALLEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "max_length": 1,
}
ABOVE_ZERO = ("num_train_epochs", "learning_rate", "logging_steps", "save_steps", "eval_steps")


@cache
def _annotations() -> dict[str, object]:
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(SFTConfig) if field.init}


@cache
def _choices() -> dict[str, list[str]]:
    """Allowed texts of the fields that have a closed list: enums, Literals and the dataclass's own `choices`."""
    from trl import SFTConfig

    choices = {}
    for field in dataclasses.fields(SFTConfig):
        enums = [part for part in _parts(_annotations().get(field.name)) if isinstance(part, enum.EnumMeta)]
        if field.metadata.get("choices"):
            choices[field.name] = [str(choice) for choice in field.metadata["choices"]]
        elif enums:
            choices[field.name] = [str(member.value) for member in enums[0]]
    return choices


def trainer_names() -> list[str]:
    """Names that the `train` section may hold."""
    return [name for name in _annotations() if name not in OWNED_ELSEWHERE]


def check_trainer_values(values: dict) -> list[tuple[str, str]]:
    """Problems of the `train` section as `(name, text)`, in the order of `values`."""
    problems = []
    for name, value in values.items():
        text = _problem(name, value)
        if text:
            problems.append((name, text))
    return problems


def _problem(name: str, value: object) -> str | None:
    if name in OWNED_ELSEWHERE:
        return f"cannot be set here: {OWNED_ELSEWHERE[name]}"
    if name not in _annotations():
        return f"unknown setting of TRL's SFTConfig{did_you_mean(name, trainer_names())}"
    expected = _expected(value, _annotations()[name])
    if expected:
        return f"must be {expected}, got {value!r}"
    if isinstance(value, str) and value not in _choices().get(name, [value]):
        return f"must be one of {', '.join(_choices()[name])}, got {value!r}{did_you_mean(value, _choices()[name])}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name in SMALLEST and value < SMALLEST[name]:
            return f"must be at least {SMALLEST[name]}, got {value}"
        if name in ABOVE_ZERO and value <= 0:
            return f"must be above 0, got {value}"
        if name == "max_steps" and value < 1 and value != -1:
            return f"must be at least 1, or -1 to go by num_train_epochs, got {value}"
    if name == "resume_from_checkpoint" and value not in (None, "auto"):
        return f"must be auto, the newest complete checkpoint of the run's own directory, got {value!r}"
    if name == "packing_strategy" and value == "wrapped":
        return "must be bfd or bfd_split, got 'wrapped', which cuts rows in the middle"
    return None


def _parts(hint: object) -> tuple:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _expected(value: object, hint: object) -> str | None:
    """What `hint` allows, in words, when `value` does not fit it; None when it fits or the hint is not a simple one."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping",
             list: "a list", types.NoneType: None}  # fmt: skip
    kinds = []
    for part in _parts(hint):
        kind = typing.get_origin(part) or part
        if kind is typing.Literal:
            if value in typing.get_args(part):
                return None
            continue
        if isinstance(kind, enum.EnumMeta):
            kind = str
        if kind not in words:
            return None
        accepted = (int, float) if kind is float else kind
        if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
            return None
        kinds.append(words[kind])
    return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
