"""The directory of a run: what it holds, and how a second run treats the first one's results."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint

from train.adapter import ADAPTER_NAME
from train.problems import Problem, SettingsError
from train.settings import RunSettings
from train.sources import shown

CONFIG_NAME = "config.yaml"
PUBLISHED_NAME = "hub"  # what launch/publish.py sent or would send
WRITTEN = (
    *(ADAPTER_NAME, "adapter_config.json", "lrsa_config.json", CONFIG_NAME, "log.jsonl", "README.md"),
    *("data_report.json", "data_report.md", "results.json", "report.md", "score_vs_keep_ratio.png", "control"),
    PUBLISHED_NAME,
)


def check_run_directory(settings: RunSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to write over an earlier run unless asked to, and to continue one that was set up differently.

    Raises:
        SettingsError: when the directory holds an adapter or checkpoints and neither flag is given, or when `resume`
            meets a run with another model, lrsa, lora or data section.
    """
    directory = Path(settings.train["output_dir"])
    earlier = directory / ADAPTER_NAME
    if not earlier.is_file():
        checkpoint = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        earlier = Path(checkpoint) if checkpoint else None
    if earlier is None or overwrite:
        return
    if not resume:
        text = (
            f"{shown(directory)} already holds a run ({earlier.name}): continue its last checkpoint with --resume, "
            "replace it with --overwrite, or choose another directory with --set train.output_dir=..."
        )
        raise SettingsError([Problem("", "train.output_dir", text)])
    _refuse_other_settings(settings, directory)


def clear_run_directory(directory: Path) -> None:
    """Delete what an earlier run wrote; other files stay."""
    for path in [directory / name for name in WRITTEN] + list(directory.glob("checkpoint-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def config_of_run(directory: str) -> str:
    """The settings file that a run left in its directory.

    Raises:
        SettingsError: when the directory is not one of a run.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        text = f"holds no {CONFIG_NAME}, so it is no directory of a run; name an adapter with --adapter and --config"
        raise SettingsError([Problem("--run", directory, text)])
    return str(path)


def _refuse_other_settings(settings: RunSettings, directory: Path) -> None:
    path = directory / CONFIG_NAME
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = yaml.safe_load(settings.to_yaml())
    problems = []
    for section in ("model", "lrsa", "lora", "objective", "data"):
        for name, value in now[section].items():
            was = before.get(section, {}).get(name, value)
            if was != value:
                text = f"was {was!r} when this run began, is {value!r}: --resume continues with the same settings only"
                problems.append(Problem(shown(path), f"{section}.{name}", text))
    if problems:
        raise SettingsError(problems)
