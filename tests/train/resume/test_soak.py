"""Half an hour of training and generation: memory stays flat, and no process, open file or thread is left over.

LRSA_SOAK_SECONDS shortens it: half of the time is training, half generation.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from tests.tiny_run import ROOT, make_workplace
from train.resume.checkpoints import checkpoints

SECONDS = float(os.environ.get("LRSA_SOAK_SECONDS", "1800"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
GROWTH = 0.02  # of the memory, over the time that is measured: what allocators do by chance in a minute stays below

GENERATE = """
import sys, torch, lrsa
model, tokenizer, new_cache = lrsa.load(sys.argv[1])
torch.manual_seed(0)
count = 0
while True:
    lengths = torch.randint(1, 60, (4,))
    mask = (torch.arange(60) >= 60 - lengths[:, None]).long()
    ids = torch.randint(3, len(tokenizer), (4, 60)) * mask
    options = {"max_new_tokens": 40, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        model.generate(ids, attention_mask=mask, past_key_values=new_cache(), **options)
    count += 1
    print(count, flush=True)
"""


class Sample(NamedTuple):
    """A process tree at one moment."""

    seconds: float
    megabytes: float
    files: int
    threads: int
    processes: int


def watch(process: subprocess.Popen, seconds: float) -> list[Sample]:
    """One sample a second, for so many seconds."""
    begin, samples = time.monotonic(), []
    while (passed := time.monotonic() - begin) < seconds:
        assert process.poll() is None, "it ended by itself"
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        parts = [(p.memory_info().rss / 2**20, p.num_fds(), p.num_threads()) for p in tree]
        samples.append(Sample(passed, *(sum(column) for column in zip(*parts, strict=True)), len(tree)))
        time.sleep(1)
    return samples


def assert_flat(samples: list[Sample], what: str) -> None:
    """After a warm-up of a third of the time nothing grows."""
    samples = samples[len(samples) // 3 :]
    slope, _ = np.polyfit([s.seconds for s in samples], [s.megabytes for s in samples], 1)
    length = samples[-1].seconds - samples[0].seconds
    middle = statistics.median(s.megabytes for s in samples)
    half = len(samples) // 2
    most = [tuple(max(column) for column in zip(*part, strict=True))[2:] for part in (samples[:half], samples[half:])]
    print(
        f"\n{what}: {length:.0f} s measured, {middle:.0f} MB, slope {slope * 60:+.3f} MB a minute; "
        f"files, threads, processes at most {most[0]} in the first half, {most[1]} in the second"
    )
    assert slope * length < GROWTH * middle, f"{what} grows by {slope * 60:.2f} MB a minute"
    assert all(after <= before for before, after in zip(*most, strict=True)), f"{what} opens more and more"


def assert_gone(group: int) -> None:
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


@pytest.mark.slow
def test_training_and_generation_for_long(tmp_path: Path, byte_tokenizer):
    workplace = make_workplace(tmp_path, byte_tokenizer)
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--config",
        "run.yaml",
        "--set",
        "train.output_dir=run",
    ]
    command += ["train.max_steps=10000000", "train.logging_steps=100", "train.save_steps=100", "eval.control=false"]
    options = {"cwd": workplace, "env": ENVIRONMENT, "start_new_session": True}
    with open(workplace / "training.txt", "w") as output:
        training = subprocess.Popen(
            [*command, "train.disable_tqdm=true"], stdout=output, stderr=subprocess.STDOUT, **options
        )
    try:
        while not checkpoints(workplace / "run"):
            assert training.poll() is None, (workplace / "training.txt").read_text()
            time.sleep(0.5)
        assert_flat(watch(training, SECONDS / 2), "training")
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=60) == 75
    finally:
        training.kill()
    assert_gone(training.pid)
    last = checkpoints(workplace / "run")[-1]
    print(f"{last.name[11:]} steps")
    with open(workplace / "generation.txt", "w") as output:
        generation = subprocess.Popen([sys.executable, "-c", GENERATE, str(last)], stdout=output, **options)
    try:
        while not (workplace / "generation.txt").read_text():
            assert generation.poll() is None
            time.sleep(0.5)
        assert_flat(watch(generation, SECONDS / 2), "generation")
    finally:
        generation.kill()
        generation.wait()
    assert_gone(generation.pid)
    print(f"{(workplace / 'generation.txt').read_text().split()[-1]} batches")
