"""Generation over a full cache (DynamicCache, sdpa) against the compressed one, side by side in one process.

    python benchmarks/serving.py --out runs/benchmarks                                   # CPU: a small shape
    python benchmarks/serving.py --out OUT --shape qwen2.5-7b --cells 1x8192 8x32768     # one GPU, bfloat16

A cell is a batch of prompts, "rows x tokens". Time to first token is one forward over the prompts and the choice of a
token; decoding is greedy, one forward per token, as `generate` does it. Every round runs both sides one after the
other; ratios are taken within a round, and their median, lowest and highest are reported. Bytes are those of the
tensors that the cache holds when decoding ends, spare room included; peak memory is that of prompt and decoding beyond
the weights. The shapes are those of real models, the weights random, so nothing is downloaded. Needs torch and
transformers only.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import ON_GPU, cell, config_of, machine, now, parser_of, peak_bytes, ratio, save, start
from benchmarks.step import SHAPES, random_model
from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation import cache_cost

SIDES = ("full", "lrsa")


@torch.no_grad()
def generate(model, ids: torch.Tensor, cache, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of the `tokens` tokens after it."""
    begin = now(ids.device)
    token = model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits.argmax(-1)
    first = now(ids.device)
    for _ in range(tokens):
        token = model(token, **{CACHE_ARGUMENT: cache}).logits.argmax(-1)
    return first - begin, now(ids.device) - first


def run_cell(options, model, rows: int, length: int, config: LRSAConfig) -> dict:
    """Both sides on one batch of prompts; the first round warms up, and its memory is what is reported."""
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=options.device)
    row = {"rows": rows, "length": length}
    first, decode = ({side: [] for side in SIDES} for _ in range(2))
    for round_ in range(options.rounds + 1):
        for side in SIDES:
            if side == "full":
                cache = DynamicCache(config=remove_lrsa(model).config)
            else:
                cache = LRSACache(apply_lrsa(model, config).config.lrsa)
            if round_ == 0:
                peak = peak_bytes(generate, model, ids, cache, options.decode, device=options.device)
                row[side] = {"cache_bytes": sum(layer.bytes for layer in cache_cost(cache)), "peak_bytes": peak}
            else:
                seconds = generate(model, ids, cache, options.decode)
                first[side].append(seconds[0])
                decode[side].append(seconds[1])
            del cache
    for side in SIDES:
        row[side]["first_token_s"] = statistics.median(first[side])
        row[side]["tokens_per_s"] = rows * options.decode / statistics.median(decode[side])
    row["first_token"], row["decode"] = (ratio(*(times[side] for side in SIDES)) for times in (first, decode))
    row["cache"] = row["lrsa"]["cache_bytes"] / row["full"]["cache_bytes"]
    return row


def losses(rows: list[dict]) -> str:
    """The cells in which the compressed cache does not win, in words."""
    names = {"first_token": "time to first token", "decode": "decoding"}
    lost = [
        f"{name} at {r['rows']} x {r['length']} ({r[key]['ratio']:.2f})"
        for key, name in names.items()
        for r in rows
        if r[key]["ratio"] < 1
    ]
    return f"Slower than the full cache (median below 1): {', '.join(lost) or 'in no cell'}.\n"


def table(rows: list[dict]) -> str:
    head = (
        "| rows x tokens | first token s, full | lrsa | times full (lowest-highest) | decode tokens/s, full | lrsa "
        "| times full (lowest-highest) | cache MiB, full | lrsa | share | peak MiB, full | lrsa |\n"
        + "|---" * 12
        + "|\n"
    )
    lines = []
    for r in rows:
        full, lrsa, first, decode = r["full"], r["lrsa"], r["first_token"], r["decode"]
        lines.append(
            f"| {r['rows']} x {r['length']} | {full['first_token_s']:.2f} | {lrsa['first_token_s']:.2f} "
            f"| {cell(first)} | {full['tokens_per_s']:.0f} | {lrsa['tokens_per_s']:.0f} | {cell(decode)} "
            f"| {full['cache_bytes'] / 2**20:.1f} | {lrsa['cache_bytes'] / 2**20:.1f} | {r['cache']:.3f} "
            f"| {full['peak_bytes'] / 2**20:.0f} | {lrsa['peak_bytes'] / 2**20:.0f} |"
        )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    cells = ["1x2048", "1x4096", "1x8192", "8x2048", "8x4096"]
    if ON_GPU:
        cells = ["1x2048", "1x4096", "1x8192", "1x16384", "1x32768", "8x2048", "8x8192", "8x32768"]
    parser = parser_of(
        __doc__, "serving.json and serving.md", rounds=3, setting="128:32",
        dtype="bfloat16" if ON_GPU else "float32",
    )  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b" if ON_GPU else "small")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to fit a small machine")
    parser.add_argument("--cells", nargs="+", default=cells, help="rows x tokens of each")
    parser.add_argument("--decode", type=int, default=128, help="tokens decoded after the first")
    options = start(parser)
    cells = [tuple(map(int, text.split("x"))) for text in options.cells]
    model = random_model(options, max(length for _, length in cells) + options.decode + 1).eval()
    rows = []
    for batch in cells:
        rows.append(run_cell(options, model, *batch, config_of(options, options.setting)))
        print(table(rows).splitlines()[-1], flush=True)
    text = f"{table(rows)}\n{losses(rows)}"
    save(options, "serving", rows, text)
    print(f"\n{machine(options.device)}, torch {torch.__version__}, {options.shape}, lag:top_k {options.setting}")
    print(text)


if __name__ == "__main__":
    main()
