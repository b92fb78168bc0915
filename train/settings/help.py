"""The settings of a run as text for `--help`, made from the same classes that check them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import fields

import pydantic

from data.settings import DataSettings
from lrsa import LRSAConfig
from train.settings.schema import EvalSettings, LoraSettings, ModelSettings, ObjectiveSettings, ParallelSettings

TRAIN = """\
  TRL's SFTConfig names, verbatim: output_dir, max_steps, num_train_epochs, learning_rate, warmup_steps,
  per_device_train_batch_size, gradient_accumulation_steps, seed, logging_steps, save_steps, eval_strategy, packing,
  deepspeed (a JSON file), report_to, ... (https://huggingface.co/docs/trl/sft_trainer). resume_from_checkpoint: auto
  means --resume. When not set: output_dir is runs/NAME-OF-THE-CONFIG, max_length is data.context_length, bf16 and
  activation_checkpointing are on with a GPU and off without, use_cpu is true without a GPU, report_to is none. The
  run's config.yaml shows what was used."""


def sections_help() -> str:
    """Every section with its settings, their defaults and meanings."""
    parts = [
        ("model", _pydantic_lines(ModelSettings)),
        ("lrsa", _lrsa_lines()),
        ("lora", _pydantic_lines(LoraSettings)),
        ("objective", _pydantic_lines(ObjectiveSettings)),
        ("data", _pydantic_lines(DataSettings)),
        ("train", [TRAIN]),
        ("parallel", _pydantic_lines(ParallelSettings)),
        ("eval", _pydantic_lines(EvalSettings)),
    ]
    return "settings:\n" + "\n".join(f"{name}:\n" + "\n".join(lines) for name, lines in parts) + "\n"


def _pydantic_lines(model: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            lines += _pydantic_lines(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            lines.append(_line(prefix + name, default, field.description or ""))
    return lines


def _lrsa_lines() -> list[str]:
    """Meanings come from the docstring of LRSAConfig, the one place where they are written."""
    text = (LRSAConfig.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    meanings = dict(re.findall(r"^\s+(\w+): (.+)$", text, flags=re.MULTILINE))
    return [_line(field.name, field.default, meanings.get(field.name, "")) for field in fields(LRSAConfig)]


def _line(name: str, default: object, meaning: str) -> str:
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    shown = str(list(default)) if isinstance(default, tuple) else " ".join(shown.split())
    shown = shown if len(shown) < 50 else f"{shown[:40]}..."
    return textwrap.fill(f"{name} ({shown}): {meaning}", 118, initial_indent="  ", subsequent_indent="      ")
