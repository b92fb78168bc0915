"""Time and memory of LRSA attention against the best dense kernel of this machine, side by side in one process.

    python benchmarks/attention.py --out runs/benchmarks                        # CPU: 1k to 16k, minutes
    bash benchmarks/gpu.sh OUT                                                  # one GPU: this and all else it shows

Every round runs all candidates one after the other, so that whatever else the machine does hits all of them; ratios are
taken within a round, and the median and the spread (lowest and highest) of the rounds are reported. The bound is the
number of query-key pairs of dense causal attention over that of LRSA. "Share" is the measured ratio over the bound; it
passes 100% where a pair costs less than it does in the best dense kernel. A candidate that fails is named and left out.
"Slope" is that of log time against log length from the next shorter length, "select" the selection alone, "peak" the
memory beyond the inputs, "kernel" what took most of the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attention_report import draw, table, with_slopes
from benchmarks.measure import config_of, in_rounds, machine, parser_of, peak_bytes, ratio, save, seconds, start
from lrsa import LRSAConfig, lrsa_attention, select_tokens
from lrsa.attention.api import IMPLEMENTATIONS


def pairs(length: int, config: LRSAConfig) -> int:
    """Query-key pairs of one head under LRSA."""
    sink, lag = min(config.sink_size, length), config.lag_size
    total = sink * (sink + 1) // 2
    for window, first in enumerate(range(sink, length, lag)):
        rows = min(lag, length - first)
        before = sink + config.top_k * max(window - 1, 0) + lag * (window > 0)
        total += rows * before + rows * (rows + 1) // 2
    return total


def dense_kernels(device: str) -> dict:
    """Dense causal attention by every kernel worth comparing on this device."""

    def using(backend):
        def run(query, key, value):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return run

    if device == "cpu":
        return {"dense sdpa": using(SDPBackend.FLASH_ATTENTION)}
    return {"dense cudnn": using(SDPBackend.CUDNN_ATTENTION), "dense flash": using(SDPBackend.FLASH_ATTENTION)}


def candidates(device: str, config: LRSAConfig, impls: list[str]) -> dict:
    ours = {impl: partial(lrsa_attention, config=config, impl=impl) for impl in impls}
    return dense_kernels(device) | ours


def measure(run, states, grad, backward: bool) -> None:
    """One call."""
    out = run(*states)
    if backward:
        torch.autograd.grad(out, states, grad)


def kernel_used(run, states, grad) -> str:
    """Name of the kernel that took most of the time."""
    activity = ProfilerActivity.CUDA if states[0].is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        measure(run, states, grad, True)
    slowest = max(trace.key_averages(), key=lambda e: getattr(e, f"self_{activity.name.lower()}_time_total", 0))
    return slowest.key[:70]


def working(runs: dict, states, grad) -> dict:
    """The candidates that can compute this; what the others say is printed."""
    usable = {}
    for name, run in runs.items():
        try:
            measure(run, states, grad, True)
        except Exception as error:  # whatever a kernel or its compiler says
            print(f"{name} failed at {states[0].shape[2]} tokens: {error!r:.500}", file=sys.stderr, flush=True)
        else:
            usable[name] = run
    if not any(name.startswith("dense") for name in usable):
        raise SystemExit("no dense kernel ran, so there is nothing to compare with")
    return usable


def run_cell(options, length: int, config: LRSAConfig) -> list[dict]:
    """All candidates at one length and one setting."""
    heads, kv_heads = options.heads
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    shapes = ((heads, True), (kv_heads, True), (kv_heads, True), (heads, False))
    *states, grad = (
        torch.randn(options.batch, h, length, options.head_dim, device=options.device, dtype=dtype, requires_grad=g)
        for h, g in shapes
    )
    runs = working(candidates(options.device, config, options.impls), states, grad)
    timed = {
        (name, backward): partial(seconds, options.device, measure, run, states, grad, backward)
        for name, run in runs.items()
        for backward in (False, True)
    }
    keys_values = [x.detach() for x in states[1:]]
    timed["selection"] = partial(seconds, options.device, select_tokens, *keys_values, config)
    times = in_rounds(options.rounds, timed)
    best = min(
        (name for name in runs if name.startswith("dense")), key=lambda name: statistics.median(times[name, True])
    )
    bound = length * (length + 1) / 2 / pairs(length, config)
    rows = []
    for name, run in runs.items():
        row = {"length": length, "lag_size": config.lag_size, "top_k": config.top_k, "name": name, "bound": bound}
        for backward, label in ((False, "forward"), (True, "both")):
            own = times[name, backward]
            row[label] = {"ms": 1e3 * statistics.median(own)} | ratio(times[best, backward], own)
        row["share"] = row["both"]["ratio"] / bound
        row["selection_ms"] = 1e3 * statistics.median(times["selection"])
        row["peak_mib"] = peak_bytes(measure, run, states, grad, True, device=options.device) / 2**20
        row["kernel"] = kernel_used(run, states, grad)
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "attention.json, attention.md, attention.png", rounds=5, setting=None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--settings", nargs="+", default=["256:64", "128:16"], help="lag_size:top_k, several allowed")
    parser.add_argument("--heads", default="8/2", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--impls", nargs="+", choices=list(IMPLEMENTATIONS), help="default: all fast ones of the device"
    )
    options = start(parser)
    options.heads = tuple(map(int, options.heads.split("/")))
    options.impls = options.impls or (["native", "tiled"] if options.device == "cpu" else ["tiled", "cudnn", "flex"])
    return options


def main() -> None:
    options, rows = parse(), []
    for setting in options.settings:
        for length in options.lengths:
            new = run_cell(options, length, config_of(options, setting))
            rows += new
            print("\n".join(table(new).splitlines()[2:]), flush=True)
            save(
                options, "attention", with_slopes(rows), table(rows)
            )  # so that a run that is cut off leaves what it has
    draw(rows, options.out / "attention.png")
    print(f"\n{machine(options.device)}, torch {torch.__version__}, {options.threads} threads, {options.dtype}")
    print(table(rows))
    print(f"wrote {options.out}/attention.json, attention.md, attention.png")


if __name__ == "__main__":
    main()
