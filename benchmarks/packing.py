"""Training steps on packed rows against padded ones: real tokens per second, side by side in one process.

    python benchmarks/packing.py --out runs/benchmarks

Documents have log-normal lengths, as texts do: most are short, a few fill the context. Both sides train on the same
documents under LRSA, with TRL's own packing ("bfd") and batches of the same number of rows, as many as fit into memory
when all of them are full.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import config_of, parser_of, seconds, start
from benchmarks.step import SHAPES, random_model, step, with_lora
from lrsa import apply_lrsa


def documents(count: int, median: int, spread: float, context: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = (median * torch.exp(spread * torch.randn(count, generator=generator))).int().clamp(16, context).tolist()
    return Dataset.from_dict({"input_ids": [torch.randint(1000, (n,), generator=generator).tolist() for n in lengths]})


def batches(rows: Dataset, size: int, packed: bool) -> list[dict]:
    """Batches of `size` rows in the order of the data; packed ones lie in one row each, as TRL lays them out."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    return [collate([rows[i] for i in range(start, start + size)]) for start in range(0, len(rows) - size + 1, size)]


def loss_of(model, batch: dict, device: str) -> torch.Tensor:
    labels = batch["labels"].to(device)
    names = batch.keys() & {"input_ids", "attention_mask", "position_ids"}
    inputs = {name: batch[name].to(device) for name in names}
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    trained = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(states[trained]).float(), labels[:, 1:][trained])


def real_tokens(batch: dict) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def speed(steps: list[tuple[int, float]]) -> float:
    """Real tokens per second over steps of (tokens, seconds)."""
    tokens, times = zip(*steps, strict=True)
    return sum(tokens) / sum(times)


def main() -> None:
    parser = parser_of(__doc__, "packing.md", rounds=12, setting="128:32")
    parser.add_argument("--context", type=int, default=2048, help="longest document, and length of a packed row")
    parser.add_argument("--median", type=int, default=400, help="median length of a document in tokens")
    parser.add_argument("--spread", type=float, default=0.8, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    options = start(parser)
    model = with_lora(random_model(options, options.context), keep=False)
    apply_lrsa(model, config_of(options, options.setting))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = documents(options.documents, options.median, options.spread, options.context)
    kinds = {
        "padded": batches(rows, options.rows, packed=False),
        "packed": batches(pack_dataset(rows, options.context, "bfd"), options.rows, packed=True),
    }
    taken = {kind: [] for kind in kinds}
    for round_ in range(options.rounds + 1):
        for kind, own in kinds.items():
            batch = own[round_ % len(own)]
            taken_now = seconds(options.device, step, partial(loss_of, model, batch, options.device), optimiser)
            taken[kind] += [(real_tokens(batch), taken_now)] * (round_ > 0)  # the first round warms up
    lines = ["| rows | real tokens per batch | share of all tokens | real tokens/s |", "|---" * 4 + "|"]
    for kind, own in kinds.items():
        real, places = sum(map(real_tokens, own)), sum(batch["input_ids"].numel() for batch in own)
        lines.append(f"| {kind} | {real / len(own):.0f} | {real / places:.1%} | {speed(taken[kind]):.0f} |")
    third = max(options.rounds // 3, 1)
    starts = range(0, options.rounds - third + 1, third)
    parts = [speed(taken["packed"][i : i + third]) / speed(taken["padded"][i : i + third]) for i in starts]
    gain = speed(taken["packed"]) / speed(taken["padded"])
    lines.append(f"\npacked / padded: {gain:.2f} (in each third of the rounds: {min(parts):.2f}-{max(parts):.2f})")
    print("\n".join(lines))
    (options.out / "packing.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
