"""The directory of a run: what it holds, and how a second run treats the first one's results."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import TextIO

import yaml

from train.model import ADAPTER_NAME
from train.resume.checkpoints import STATE, checkpoints
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings
from train.settings.sources import shown

CONFIG_NAME = "config.yaml"
PUBLISHED_NAME = "hub"  # what launch/publish.py sent or would send
RESULTS = ("results.json", "report.md", "score_vs_keep_ratio.png", "training_losses.png")  # of an adapter
WRITTEN = (
    *(STATE, ADAPTER_NAME, "adapter_config.json", "lrsa_config.json", "log.jsonl", "README.md"),
    *("data_report.json", "data_report.md", *RESULTS, "control"),
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
        SettingsError: when the directory holds an adapter or checkpoints and neither flag is given, when `resume` meets
            a run with other settings, apart from eval and those of train that may change on the way, or when files of
            no run would be written over.
    """
    directory = Path(settings.train["output_dir"])
    foreign = [] if (directory / CONFIG_NAME).is_file() else [name for name in WRITTEN if (directory / name).exists()]
    if foreign:
        text = (
            f"{shown(directory)} holds {', '.join(foreign)} but no {CONFIG_NAME}, so it is no run's directory, "
            "and a run would write over that: choose another directory with --set train.output_dir=..., or move the "
            "files away"
        )
        raise SettingsError([Problem("", "train.output_dir", text)])
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


def discard_results(directory: Path) -> None:
    """Delete what was measured and prepared of an adapter that is about to be trained further."""
    for name in RESULTS:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / PUBLISHED_NAME, ignore_errors=True)


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
    before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(settings.to_yaml())
    problems = []
    for section in (name for name in now if name != "eval"):
        was, is_now = before.get(section, {}), now[section]
        for name in IN_CHECKPOINTS if section == "train" else was.keys() | is_now.keys():
            if was.get(name) != is_now.get(name):
                values = f"was {was.get(name)!r} when this run began, is {is_now.get(name)!r}"
                text = f"{values}: --resume continues with the same settings only"
                problems.append(Problem(shown(path), f"{section}.{name}", text))
    rows, rows_now = (_rows_per_process(values["train"]) for values in (before, now))
    if rows != rows_now:
        text = (
            f"a process read {rows} rows a step when this run began, and would read {rows_now}: with --resume, "
            "per_device_train_batch_size times gradient_accumulation_steps has to stay what it was"
        )
        problems.append(Problem(shown(path), "train.per_device_train_batch_size", text))
    if problems:
        raise SettingsError(problems)


def _rows_per_process(train: dict) -> int:
    """Rows that a process reads for one step of the optimizer; what is not set has transformers' default."""
    return train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
