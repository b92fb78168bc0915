"""Whole runs by the command line, one process and several, that are killed, stopped or lose a process."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny_run import make_workplace
from tests.train.resume.launched import LAUNCHERS, STARTED, alive, assert_same, start, step_of, steps_taken, wait_until
from train.resume.checkpoints import checkpoints, damage

KILLS = int(os.environ.get("LRSA_KILLS", "12"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


@pytest.fixture(autouse=True)
def nothing_left():
    """A test that fails leaves no run behind."""
    yield
    for process in STARTED:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    STARTED.clear()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_killed_at_random_moments(workplace, launcher):
    """SIGKILL to all processes at once, half of the times while a checkpoint is being written, until enough are had."""
    rng, expected, name = random.Random(1), workplace / f"whole {launcher}", ""
    lost, halves = [], 0
    began = time.monotonic()
    whole = start(workplace, expected.name, launcher)
    assert wait_until((expected / "config.yaml").is_file, whole)
    ready = time.monotonic()
    assert whole.wait() == 0, (workplace / f"{expected.name}.txt").read_text()[-3000:]
    training, runs = time.monotonic() - ready, 0
    while len(lost) < KILLS or name:
        if not name:
            name, runs = f"killed {launcher} {runs}", runs + 1
        process, directory = start(workplace, name, launcher, "--resume"), workplace / name
        if len(lost) < KILLS:
            if len(lost) % 2:
                half = rng.choice([directory, directory / "control"]) / f"checkpoint-{rng.choice([2, 4, 6, 8, 10])}"
                hit = wait_until(lambda half=half: half.is_dir() and not (half / "complete.json").exists(), process)
            else:
                end = time.monotonic() + rng.uniform(ready - began, ready - began + 0.8 * training)
                hit = wait_until(lambda end=end: time.monotonic() > end, process)
            if hit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                current = directory / "control" if (directory / "control").is_dir() else directory
                halves += sum(damage(path) is not None for path in checkpoints(current))
                lost.append(steps_taken(current) - step_of(current))
                continue
        assert process.wait() == 0, (workplace / f"{name}.txt").read_text()[-3000:]
        assert_same(workplace / name, expected)
        name = ""
    print(
        f"\n{launcher}: {len(lost)} kills over {runs} runs survived, {halves} in half a checkpoint; steps lost {lost}"
    )


@pytest.mark.slow
def test_sigterm_under_the_launcher(workplace):
    """To the whole group, as a terminal, `timeout` or a queue sends it."""
    whole = start(workplace, "whole launched", "ZeRO-2")
    assert whole.wait() == 0
    process, directory = start(workplace, "launched", "ZeRO-2"), workplace / "launched"
    assert wait_until((directory / "checkpoint-2").is_dir, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() != 0
    text = workplace / "launched.txt"
    wait_until(lambda: "The same command with --resume continues from" in text.read_text(), seconds=60)
    wait_until(lambda: not alive(process.pid), seconds=60)
    assert "Traceback" not in text.read_text()
    assert start(workplace, "launched", "ZeRO-2", "--resume").wait() == 0
    assert_same(directory, workplace / "whole launched")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others(workplace, rank):
    name = f"dead-{rank}"
    process, directory = start(workplace, name, "ZeRO-2"), workplace / name
    assert wait_until((directory / "checkpoint-2" / "complete.json").is_file, process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if f"--local_rank={rank}" in p.cmdline()]
    killed = time.monotonic()
    ranks[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=90) != 0
    wait_until(lambda: not alive(process.pid), seconds=60)
    print(f"\nrank {rank} killed: all processes ended {time.monotonic() - killed:.0f} s later")
    assert "Another process of this run died" in (workplace / f"{name}.txt").read_text()
    assert step_of(directory) >= 2 and not (directory / "adapter_model.safetensors").exists()
