"""The directory of a run: what it holds, and how a second run treats the first one's results."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import TextIO

import yaml

from train.adapter import ADAPTER_NAME
from train.checkpoints import STATE, checkpoints
from train.problems import Problem, SettingsError
from train.settings import RunSettings
from train.sources import shown

CONFIG_NAME = "config.yaml"
PUBLISHED_NAME = "hub"  # what launch/publish.py sent or would send
WRITTEN = (
    *(STATE, ADAPTER_NAME, "adapter_config.json", "lrsa_config.json", "log.jsonl", "README.md"),
    *("data_report.json", "data_report.md", "results.json", "report.md", "score_vs_keep_ratio.png", "control"),
    PUBLISHED_NAME,
    CONFIG_NAME,  # last: while it is there, --resume sees which settings belong to what is left
)
# Settings of `train` that a checkpoint holds, or that order the rows: a change would be ignored, or be half of one.
IN_CHECKPOINTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "packing", "packing_strategy"),
)


def check_run_directory(settings: RunSettings, resume: bool, overwrite: bool) -> None:
    """Refuse to write over an earlier run unless asked to, and to continue one that was set up differently.

    Raises:
        SettingsError: when the directory holds an adapter or checkpoints and neither flag is given, or when `resume`
            meets a run with other settings, apart from eval and those of train that may change on the way.
    """
    directory = Path(settings.train["output_dir"])
    earlier = directory / ADAPTER_NAME
    if not earlier.is_file():
        earlier = next(reversed(checkpoints(directory)), None)
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
    for path in [*checkpoints(directory), *(directory / name for name in WRITTEN)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_run_directory(directory: Path) -> TextIO:
    """Keep other runs out of a directory for as long as the result is open; a process that is killed lets go of it.

    Raises:
        SettingsError: when another run is at work there, such as one that its killed launcher left behind.
    """
    lock = open(directory / ".lock", "w")  # noqa: SIM115 (the caller keeps it open)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"another run is at work in {shown(directory)}: wait for it, end it, or choose another directory"
        raise SettingsError([Problem("", "train.output_dir", text)]) from None
    return lock


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
    for section in (name for name in now if name != "eval"):
        for name, value in now[section].items():
            if section == "train" and name not in IN_CHECKPOINTS:
                continue
            was = before.get(section, {}).get(name, value)
            if was != value:
                text = f"was {was!r} when this run began, is {value!r}: --resume continues with the same settings only"
                problems.append(Problem(shown(path), f"{section}.{name}", text))
    if problems:
        raise SettingsError(problems)
