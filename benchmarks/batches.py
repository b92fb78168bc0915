"""Padded rows and packed documents: one call against a Python loop over the rows, side by side in one process.

    python benchmarks/batches.py --out runs/benchmarks

Lengths are drawn so that the longest row is about eight times the shortest. "One call" hands `lrsa_attention` the
padded batch or the packed row; the loop hands it every row alone, without padding: least work, most calls.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import cell, config_of, in_rounds, parser_of, ratio, seconds, start
from lrsa import LRSAConfig, lrsa_attention


def lengths_of(rows: int, longest: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [longest, *(longest * (0.125 + 0.875 * torch.rand(rows - 1, generator=generator))).int().tolist()]


def step(run, states: list[torch.Tensor]) -> None:
    """Forward and backward of one candidate."""
    torch.autograd.grad(sum(out.sum() for out in run()), states)


def compare(options, rows: int, longest: int, config: LRSAConfig) -> list[str]:
    heads, kv_heads = map(int, options.heads.split("/"))
    lengths = lengths_of(rows, longest)
    total = sum(lengths)
    dtype = getattr(torch, options.dtype)

    def states(batch, tokens):
        shapes = ((heads, options.head_dim), (kv_heads, options.head_dim), (kv_heads, options.head_dim))
        return [
            torch.randn(batch, h, tokens, d, device=options.device, dtype=dtype, requires_grad=True) for h, d in shapes
        ]

    padded, packed = states(rows, longest), states(1, total)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long().to(options.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(options.device)
    starts = [sum(lengths[:i]) for i in range(rows)]
    candidates = {
        "padded, one call": (lambda: [lrsa_attention(*padded, config, attention_mask=mask)], padded),
        "padded, loop": (
            lambda: [
                lrsa_attention(*(x[i : i + 1, :, :n] for x in padded), config) for i, n in enumerate(lengths)
            ],
            padded,
        ),
        "packed, one call": (lambda: [lrsa_attention(*packed, config, position_ids=positions)], packed),
        "packed, loop": (
            lambda: [
                lrsa_attention(*(x[:, :, s : s + n] for x in packed), config)
                for s, n in zip(starts, lengths, strict=True)
            ],
            packed,
        ),
    }  # fmt: skip
    times = in_rounds(
        options.rounds, {name: partial(seconds, options.device, step, *pair) for name, pair in candidates.items()}
    )
    lines = []
    for kind in ("padded", "packed"):
        one, loop = times[f"{kind}, one call"], times[f"{kind}, loop"]
        lines.append(
            f"| {rows} x up to {longest} | {kind} | {total} | {1e3 * statistics.median(one):.1f} "
            f"| {1e3 * statistics.median(loop):.1f} | {cell(ratio(loop, one))} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = parser_of(__doc__, "batches.md", rounds=5, setting="128:32")
    parser.add_argument("--batches", nargs="+", default=["32x512", "8x2048", "4x8192"], help="rows x longest row")
    parser.add_argument("--heads", default="8/2", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=64)
    options = start(parser)
    config = config_of(options, options.setting)
    head = (
        "| batch | kind | real tokens | one call ms | loop ms | times the loop (lowest-highest) |\n" + "|---" * 6 + "|"
    )
    print(head)
    lines = [line for batch in options.batches for line in compare(options, *map(int, batch.split("x")), config)]
    (options.out / "batches.md").write_text("\n".join([head, *lines]) + "\n")


if __name__ == "__main__":
    main()
