"""Which checkpoints can be trusted: a checkpoint counts once a list of its files, written last, says that it is whole.

A process can be killed while it writes, a disk can fill up, and a file can be cut short later. `complete.json` names
every file of the checkpoint with its size, the number of processes that wrote it and their ZeRO stage.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from rich.console import Console
from transformers import TrainingArguments

from train.model import AdapterError, verify_adapter
from train.settings.errors import Problem, SettingsError

COMPLETE = "complete.json"
STATE = "trainer_state.json"


def mark_complete(checkpoint: Path, made_by: dict) -> None:
    """Say that a checkpoint is whole, once its files are on the disk and not only on their way to it.

    Args:
        made_by: the processes and their ZeRO stage, as `newest_checkpoint` compares them.
    """
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(files)}
    replace_text(checkpoint / COMPLETE, json.dumps({"made_by": made_by, "bytes": sizes}, indent=2) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being continued; None when nothing does."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["bytes"]
    except FileNotFoundError:
        return "it was not written to its end (or without the optimizer, by train.save_only_model)"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"its {COMPLETE} cannot be read: {error}"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} {'is missing' if found is None else f'has {found} of {size} bytes'}"
    return None


def newest_checkpoint(directory: Path, made_by: dict, console: Console) -> Path | None:
    """The newest whole checkpoint of a run, None when there is none; says which newer ones are passed over and why.

    Raises:
        SettingsError: when other processes wrote it than those that would continue it, for its optimizer's state is
            split among them.
    """
    for checkpoint in reversed(checkpoints(directory)):
        reason = damage(checkpoint)
        if reason is not None:
            console.print(f"passed over {checkpoint}: {reason}", soft_wrap=True)
            continue
        before = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["made_by"]
        if before != made_by:
            text = (
                f"{checkpoint} was written by {_described(before)}, this run has {_described(made_by)}: continue "
                "with as many processes and the same train.deepspeed, or start again with --overwrite"
            )
            raise SettingsError([Problem("", "--resume", text)])
        return checkpoint
    return None


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, from the oldest step to the newest."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_damaged(directory: Path) -> None:
    """Delete checkpoints that cannot be continued, so that no file of theirs ends up in one that is written anew."""
    for checkpoint in checkpoints(directory):
        if damage(checkpoint) is not None:
            shutil.rmtree(checkpoint)


def remove_old(directory: Path, most: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `most` (`train.save_total_limit`), but never the newest or the best one."""
    found = checkpoints(directory)
    if most is None or most < 1:
        return
    removable = [path for path in found[:-1] if best is None or path != Path(best)]
    for checkpoint in removable[: max(0, len(found) - most)]:
        shutil.rmtree(checkpoint)


def is_finished(args: TrainingArguments) -> bool:
    """Whether `args.output_dir` holds an adapter that was trained for as many steps as `args` ask for."""
    try:
        verify_adapter(args.output_dir)
        state = json.loads((Path(args.output_dir) / STATE).read_text(encoding="utf-8"))
    except (AdapterError, OSError, ValueError):
        return False
    if state["global_step"] < state["max_steps"]:
        return False
    if args.max_steps > 0:
        return args.max_steps <= state["global_step"]
    return args.num_train_epochs <= state["epoch"] + 1e-6


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: whoever is killed meanwhile leaves the earlier one."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _described(made_by: dict) -> str:
    count, stage = made_by["processes"], made_by["zero_stage"]
    return (
        f"{count} process{'es' if count > 1 else ''} {'without DeepSpeed' if stage is None else f'under ZeRO-{stage}'}"
    )
