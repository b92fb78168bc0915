"""Complete checkpoints: a checkpoint counts once the list of its files, which is written last, is there.

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

from train.adapter import AdapterError, verify_adapter
from train.settings.errors import Problem, SettingsError

COMPLETE = "complete.json"
STATE = "trainer_state.json"
COUNTED = "counted"  # in the state of a finished adapter


def mark_complete(checkpoint: Path, made_by: dict) -> None:
    """Mark a checkpoint as complete, once its files are synchronised to the disk.

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
    """Why a checkpoint cannot be resumed; None when it is complete."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["bytes"]
    except FileNotFoundError:
        return f"no {COMPLETE} (writing it was interrupted, or train.save_only_model left out the optimizer)"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{COMPLETE} cannot be read: {error}"
    for name, size in sizes.items():
        path = checkpoint / name
        now = path.stat().st_size if path.is_file() else None
        if now != size:
            return f"{name} {'is missing' if now is None else f'has {now} of {size} bytes'}"
    return None


def newest_checkpoint(directory: Path, made_by: dict, console: Console) -> Path | None:
    """The newest complete checkpoint of a run, None when there is none; prints which newer ones are skipped and why.

    Raises:
        SettingsError: when the number of processes or the ZeRO stage differs: the optimizer's state is split among
            the processes.
    """
    for checkpoint in reversed(checkpoints(directory)):
        reason = damage(checkpoint)
        if reason is not None:
            console.print(f"Skipping incomplete checkpoint {checkpoint}: {reason}", soft_wrap=True)
            continue
        before = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["made_by"]
        if before != made_by:
            text = (
                f"{checkpoint} was written by {_described(before)}, this run has {_described(made_by)}: resume with "
                "the same number of processes and the same train.deepspeed, or start again with --overwrite"
            )
            raise SettingsError([Problem("", "--resume", text)])
        return checkpoint
    return None


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, from the oldest step to the newest."""
    paths = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_damaged(directory: Path) -> None:
    """Delete incomplete checkpoints, so that none of their files ends up in a checkpoint of the same step."""
    for checkpoint in checkpoints(directory):
        if damage(checkpoint) is not None:
            shutil.rmtree(checkpoint)


def remove_old(directory: Path, most: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `most` (`train.save_total_limit`), but never the newest or the best one."""
    present = checkpoints(directory)
    if most is None or most < 1:
        return
    removable = [path for path in present[:-1] if best is None or path != Path(best)]
    for checkpoint in removable[: max(0, len(present) - most)]:
        shutil.rmtree(checkpoint)


def is_finished(args: TrainingArguments, **limits: float | None) -> bool:
    """Whether `args.output_dir` holds an adapter that was trained for as many steps as asked for, or until one of the
    `limits` (of what `ResumableTrainer.counted` names) ended its training."""
    try:
        verify_adapter(args.output_dir)
        state = json.loads((Path(args.output_dir) / STATE).read_text(encoding="utf-8"))
    except (AdapterError, OSError, ValueError):
        return False
    if state["global_step"] < state["max_steps"]:
        return False
    counted = state["stateful_callbacks"].get(COUNTED, {})
    if any(limit is not None and counted.get(name, 0) >= limit for name, limit in limits.items()):
        return True
    if args.max_steps > 0:
        return args.max_steps <= state["global_step"]
    return args.num_train_epochs <= state["epoch"] + 1e-6


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: a process that is killed meanwhile leaves the earlier one."""
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
