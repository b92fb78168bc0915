"""The settings of one run, read from YAML and `--set`, checked all at once before anything heavy starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pydantic
import yaml

from data.settings import DataSettings
from lrsa import LRSAConfig
from lrsa.config import LRSAConfigError
from train.settings.errors import SettingsError, did_you_mean, unknown_setting
from train.settings.paths import check_deepspeed, with_data_files, with_model_files
from train.settings.schema import EvalSettings, LoraSettings, ModelSettings, ObjectiveSettings, ParallelSettings
from train.settings.sources import Source, read_source
from train.settings.trainer_names import check_trainer_values, trainer_names
from train.settings.wording import in_words

SECTIONS = ("model", "lrsa", "lora", "objective", "data", "train", "parallel", "eval")


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run. `train` holds TRL's own `SFTConfig` names."""

    model: ModelSettings
    lrsa: LRSAConfig
    lora: LoraSettings
    objective: ObjectiveSettings
    data: DataSettings
    train: dict
    parallel: ParallelSettings
    eval: EvalSettings
    file: Path

    def to_yaml(self) -> str:
        """The settings as a YAML file that `load_settings` reads back to the same settings."""
        sections = {
            "model": self.model.model_dump(mode="json"),
            "lrsa": self.lrsa.to_dict(),
            "lora": self.lora.model_dump(mode="json"),
            "objective": self.objective.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "train": self.train,
            "parallel": self.parallel.model_dump(mode="json"),
            "eval": self.eval.model_dump(mode="json"),
        }
        return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)


def load_settings(config: str, overrides: list[str] | None = None) -> RunSettings:
    """Read and check the settings of a run.

    Args:
        config: a YAML file; also looked up in the repository's `configs/`, with or without `.yaml`.
        overrides: `section.key=value` texts, the value in YAML; they replace what the file says.

    Raises:
        SettingsError: listing every problem with file, line, field, value and what to change.
    """
    source = read_source(config, list(overrides or []))
    found: list[tuple[tuple, str]] = []
    sections = {name: _section(source, name, found) for name in SECTIONS}
    found += _unknown_sections(source)
    model_values, problems = with_model_files(source, sections["model"])
    found += problems
    built = {
        "model": _build(ModelSettings, "model", model_values, found),
        "lrsa": _build_lrsa(sections["lrsa"], found),
        "lora": _build(LoraSettings, "lora", sections["lora"], found),
        "objective": _build(ObjectiveSettings, "objective", sections["objective"], found),
        "data": _build(DataSettings, "data", with_data_files(source, sections["data"]), found),
        "parallel": _build(ParallelSettings, "parallel", sections["parallel"], found),
        "eval": _build(EvalSettings, "eval", sections["eval"], found),
    }
    train = dict(sections["train"])
    found += [(("train", name), text) for name, text in check_trainer_values(train)]
    found += check_deepspeed(source, train)
    if built["data"] is not None:
        found += _check_max_length(train, built["data"].context_length)
    found = _with_homes(sections, found)
    problems = [source.problem(path, text) for path, text in sorted(found, key=lambda item: source.order(item[0]))]
    if source.problems or problems:
        raise SettingsError(source.problems + problems)
    return RunSettings(train=train, file=source.file, **built)


def _section(source: Source, name: str, found: list) -> dict:
    values = source.values.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict):
        found.append(((name,), f"must be a section with indented settings below it, got {values!r}"))
        return {}
    return values


def _unknown_sections(source: Source) -> list[tuple[tuple, str]]:
    unknown = [name for name in source.values if name not in SECTIONS]
    hint = f"sections are {', '.join(SECTIONS)}"
    return [((name,), f"unknown section{did_you_mean(name, SECTIONS)}; {hint}") for name in unknown]


def _build(model: type[pydantic.BaseModel], section: str, values: dict, found: list):
    """An instance of a section's model, or None with its problems added to `found`."""
    try:
        return model.model_validate(values, strict=True)
    except pydantic.ValidationError as error:
        found += [((section, *item["loc"]), in_words(item, model)) for item in error.errors()]
        return None


def _build_lrsa(values: dict, found: list) -> LRSAConfig | None:
    """The LRSA configuration; it checks itself, one line per problem, each beginning with the field's name."""
    names = [field.name for field in fields(LRSAConfig)]
    known = {name: value for name, value in values.items() if name in names}
    found += [(("lrsa", name), unknown_setting(name, names)) for name in values if name not in names]
    try:
        return LRSAConfig(**known)
    except LRSAConfigError as error:
        found += [(("lrsa", name), text) for name, text in error.problems]
        return None


def _with_homes(sections: dict, found: list) -> list:
    """Adds to an unknown setting the section where that name does exist."""
    homes = {
        "model": list(ModelSettings.model_fields), "lrsa": [field.name for field in fields(LRSAConfig)],
        "lora": list(LoraSettings.model_fields), "objective": list(ObjectiveSettings.model_fields),
        "data": list(DataSettings.model_fields),
        "eval": list(EvalSettings.model_fields), "train": trainer_names(),
        "parallel": list(ParallelSettings.model_fields),
    }  # fmt: skip
    result = []
    for path, text in found:
        owners = [section for section, names in homes.items() if len(path) == 2 and path[1] in names]
        if text.startswith("unknown setting") and owners:
            text = f"unknown setting here; it belongs to section {owners[0]}"
        result.append((path, text))
    return result


def _check_max_length(train: dict, context_length: int) -> list[tuple[tuple, str]]:
    length = train.get("max_length")
    if isinstance(length, int) and length < context_length:
        text = f"must be at least data.context_length ({context_length}), got {length}: rows would be cut; remove it"
        return [(("train", "max_length"), text)]
    return []
