"""The settings of one run, read from YAML and `--set`, checked all at once before anything heavy starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pydantic

from data.settings import DataSettings
from lrsa import LRSAConfig
from lrsa.config import LRSAConfigError
from train.settings.errors import FieldPath, SettingsError, did_you_mean, field_problems, unknown_setting
from train.settings.paths import check_deepspeed, relative_to, with_adapter_files, with_data_files, with_model_files
from train.settings.schema import (
    LRSA,
    SECTIONS,
    EvalSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    ParallelSettings,
    TrainSettings,
)
from train.settings.sources import Source, read_source, to_yaml
from train.settings.unused import without_effect


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run."""

    model: ModelSettings
    lrsa: LRSAConfig
    lora: LoraSettings
    objective: ObjectiveSettings
    data: DataSettings
    train: TrainSettings
    parallel: ParallelSettings
    eval: EvalSettings
    file: Path
    from_command_line: frozenset[FieldPath] = field(default=frozenset(), compare=False)

    def to_dict(self) -> dict[str, dict]:
        """The sections as plain values; of `train` what the configuration and our defaults set."""
        own = {"lrsa": self.lrsa.to_dict(), "train": self.train.given()}
        return {name: own.get(name) or getattr(self, name).model_dump(mode="json") for name in SECTIONS}

    def to_yaml(self, folder: Path | None = None) -> str:
        """The settings as a YAML file that `load_settings` reads back to the same settings.

        Args:
            folder: where the file will lie; local paths below the working directory are then written relative to it.
        """
        values = self.to_dict()
        return to_yaml(values if folder is None else relative_to(values, folder))


def load_settings(config: str, overrides: list[str] | None = None) -> RunSettings:
    """Read and check the settings of a run.

    Args:
        config: a YAML file; also looked up in the repository's `configs/`, with or without `.yaml`.
        overrides: `section.key=value` texts, the value in YAML; they replace what the file says.

    Raises:
        SettingsError: listing every problem with file, line, field, value and what to change.
    """
    source = read_source(config, list(overrides or []))
    problems: dict[FieldPath, str] = {}
    values = {name: _section(source, name, problems) for name in SECTIONS}
    for name in [name for name in source.values if name not in SECTIONS]:
        hint = did_you_mean(name, SECTIONS)
        problems[(name,)] = f"unknown section{hint}; sections are {', '.join(SECTIONS)}"
    values["model"] = with_model_files(source, values["model"], problems)
    values["lora"] = with_adapter_files(source, values["lora"], problems)
    values["data"] = with_data_files(source, values["data"])
    values["train"] = check_deepspeed(source, values["train"], problems)
    built = {name: _build(name, values[name], problems) for name in SECTIONS}
    problems |= without_effect(built) | _conflicts(built)
    told = [source.problem(path, problems[path]) for path in sorted(problems, key=source.order)]
    if source.problems or told:
        raise SettingsError(source.problems + told)
    return RunSettings(file=source.file, from_command_line=frozenset(source.from_command_line), **built)


def _section(source: Source, name: str, problems: dict) -> dict:
    values = source.values.get(name)
    if isinstance(values, dict):
        return values
    if values is not None:
        problems[(name,)] = f"must be a section with indented settings below it, got {values!r}"
    return {}


def _build(section: str, values: dict, problems: dict):
    """An instance of a section, or None with its problems added to `problems`; the first one of a field counts."""
    model = SECTIONS[section]
    homes = {name: other for other in reversed(SECTIONS) for name in _names(other)}
    try:
        if section != "lrsa":
            return model.model_validate(values, strict=True)
        for name in [name for name in values if name not in LRSA]:
            home = f"unknown setting here; it belongs to section {homes.get(name)}"
            problems[("lrsa", name)] = home if name in homes else unknown_setting(name, LRSA)
        return LRSAConfig(**{name: value for name, value in values.items() if name in LRSA})
    except LRSAConfigError as error:
        found = {(name,): text for name, text in error.problems}
    except pydantic.ValidationError as error:
        found = field_problems(error, model, values, homes)
    for path, text in found.items():
        problems.setdefault((section, *path), text)
    return None


def _names(section: str) -> list[str]:
    return list(LRSA) if section == "lrsa" else list(SECTIONS[section].model_fields)


def _conflicts(built: dict) -> dict[FieldPath, str]:
    """What two sections say that does not go together."""
    problems: dict[FieldPath, str] = {}
    train, data, lrsa, objective = (built[name] for name in ("train", "data", "lrsa", "objective"))
    if train and data and train.max_length is not None and train.max_length < data.context_length:
        problems["train", "max_length"] = (
            f"must be at least data.context_length ({data.context_length}), got {train.max_length}: rows would be cut; "
            "remove it"
        )
    if train and train.early_stopping_patience and train.eval_strategy == "no":
        problems["train", "early_stopping_patience"] = "needs train.eval_strategy: steps, and train.eval_steps"
    if train and data and train.eval_strategy != "no" and not any(one.eval_rows for one in data.each().values()):
        problems["train", "eval_strategy"] = "needs rows that are held out: set data.eval_rows above 0, or it to no"
    if (
        train
        and None not in (old := (train.gradient_checkpointing, train.activation_checkpointing))
        and old[0] != old[1]
    ):
        problems["train", "gradient_checkpointing"] = (
            f"is the older name of activation_checkpointing, which is {str(old[1]).lower()}: remove one of the two"
        )
    if train and train.max_minutes and objective and objective.schedule == "shrink":
        problems["objective", "schedule"] = (
            "shrink divides the steps, whose number is not known with train.max_minutes: use draw, or train.max_steps"
        )
    if train and data and data.streaming and train.max_steps < 1:
        problems["train", "max_steps"] = (
            "must be set with data.streaming, for data that are read as needed have no known end"
        )
    if data and data.streaming and built["parallel"] and built["parallel"].sp_size > 1:
        text = "cannot be used with parallel.sp_size above 1, which shares out rows that are known: set it to false"
        problems["data", "streaming"] = text
    if lrsa and objective and objective.keep_ratios:
        trained = sorted({lrsa.with_keep_ratio(ratio).top_k for ratio in objective.keep_ratios})
        if lrsa.top_k not in trained:
            problems["lrsa", "top_k"] = (
                f"must be one of the trained {', '.join(map(str, trained))} (objective.keep_ratios "
                f"{objective.keep_ratios} of lag_size {lrsa.lag_size}), got {lrsa.top_k}: change it, or add "
                f"{lrsa.keep_ratio:g} to objective.keep_ratios"
            )
    return problems
