"""Runs by the real command line, what is left of them, and whether two of them are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny_run import ROOT, free_port
from train.resume.checkpoints import checkpoints, damage

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
ZERO = "train.gradient_accumulation_steps={} train.per_device_train_batch_size=1"
ZERO += " train.deepspeed=configs/deepspeed/zero{}.json"
LAUNCHERS = {
    "one process": "",
    "ZeRO-2": ZERO.format(2, 2),
    "ZeRO-3": ZERO.format(2, 3),
    "ZeRO-3 with Ulysses": ZERO.format(4, 3) + " parallel.sp_size=2",
}
STARTED: list[subprocess.Popen] = []


def start(workplace: Path, name: str, launcher: str, *options: str) -> subprocess.Popen:
    """The command line, as the leader of a process group of its own; its output goes to NAME.txt."""
    sets = LAUNCHERS[launcher].split()
    command = [sys.executable]
    if sets:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        port = str(free_port())
        command = [str(deepspeed), "--num_gpus", "2", "--master_port", port]
    command += [str(ROOT / "launch" / "train.py"), "--config", "run.yaml", *options]
    with open(workplace / f"{name}.txt", "a") as output:
        process = subprocess.Popen(
            [*command, "--set", f"train.output_dir={name}", *sets],
            cwd=workplace, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    STARTED.append(process)
    return process


def wait_until(found, process: subprocess.Popen | None = None, seconds: float = 900) -> bool:
    """Whether `found()` came true before the process ended."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited in vain"
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def lines(directory: Path) -> list[dict]:
    """The log without what the clock decides."""
    found = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found if "loss" in line]


def assert_same(directory: Path, expected: Path) -> None:
    """The same log and the same adapters, bit for bit, and no checkpoint that is half there."""
    for found, wanted in ((directory, expected), (directory / "control", expected / "control")):
        assert [line["step"] for line in lines(wanted)] == [3, 6, 9]
        assert lines(found) == lines(wanted)
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (found, wanted))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert [path.name for path in checkpoints(found)] == ["checkpoint-8", "checkpoint-10"]
        assert not any(damage(path) for path in checkpoints(found))


def step_of(directory: Path) -> int:
    """The newest step that can be continued."""
    return max((int(path.name[11:]) for path in checkpoints(directory) if damage(path) is None), default=0)


def steps_taken(directory: Path) -> int:
    """The last step that left a trace: in the log, or a checkpoint, whole or not."""
    log = directory / "log.jsonl"
    logged = [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.is_file() else []
    return max([0, *logged, *(int(path.name[11:]) for path in checkpoints(directory))])


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
