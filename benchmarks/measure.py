"""What the benchmarks share: options, interleaved rounds, ratios within rounds, peak memory, results on disk."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lrsa import LRSAConfig

ON_GPU = torch.cuda.is_available()


def parser_of(doc: str, files: str, *, rounds: int, setting: str | None, dtype: str = "float32"):
    """A parser with the options of every benchmark.

    Args:
        files: what is written into the folder `--out`.
        setting: default of `--setting`; None leaves the option out.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {files}")
    if setting is not None:
        parser.add_argument("--setting", default=setting, help="lag_size:top_k")
    parser.add_argument("--sink-size", type=int, default=16)
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if ON_GPU else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options, seed, set the threads, make the folder."""
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def config_of(options: argparse.Namespace, setting: str) -> LRSAConfig:
    """The compression of `lag_size:top_k`."""
    return LRSAConfig(options.sink_size, *map(int, setting.split(":")))


def now(device: str | torch.device) -> float:
    """Seconds on a clock, once the device has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: str | torch.device, call: Callable, *args) -> float:
    """Seconds of `call(*args)`."""
    begin = now(device)
    call(*args)
    return now(device) - begin


def in_rounds(count: int, runs: dict[Hashable, Callable[[], Any]]) -> dict[Hashable, list]:
    """What every run returns in `count` rounds, each of which calls all of them; a first round warms up."""
    results = {name: [] for name in runs}
    for number in range(count + 1):
        for name, run in runs.items():
            result = run()
            if number:
                results[name].append(result)
    return results


def ratio(reference: list[float], times: list[float]) -> dict[str, float]:
    """How many times faster than the reference, within each round: median, lowest and highest."""
    ratios = sorted(a / b for a, b in zip(reference, times, strict=True))
    return {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def cell(values: dict) -> str:
    """A ratio in a table: `2.95 (1.92-4.39)`."""
    return f"{values['ratio']:.2f} ({values['lowest']:.2f}-{values['highest']:.2f})"


def peak_bytes(call: Callable, *args, device: str = "cpu") -> int:
    """Largest sum of allocations that are live at once during `call(*args)`; what was allocated before is not counted.

    On a GPU by the caching allocator's own record, on a CPU by the events that its allocator sends to the profiler.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call(*args)
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def machine(device: str) -> str:
    """The GPU, or the model of the CPU where Linux tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]} CPU"


def save(options: argparse.Namespace, name: str, rows: list[dict], text: str) -> None:
    """Write `name.json` with the machine and the options, and `name.md`."""
    facts = {"machine": machine(options.device), "torch": torch.__version__}
    facts |= {"options": {key: str(value) for key, value in vars(options).items()}, "rows": rows}
    (options.out / f"{name}.json").write_text(json.dumps(facts, indent=1))
    (options.out / f"{name}.md").write_text(text)
