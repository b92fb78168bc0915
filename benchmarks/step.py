"""A whole LoRA training step, dense against LRSA: tokens per second and peak memory, side by side in one process.

    python benchmarks/step.py --out runs/benchmarks                                   # CPU: a tiny shape
    python benchmarks/step.py --out OUT --shape qwen2.5-7b --lengths 16384 32768 65536 --dtype bfloat16   # one GPU

The shapes are those of real models, the weights random, so nothing is downloaded. Both sides run the same code: LoRA
on every linear layer, every layer checkpointed (recomputed in the backward) unless `--keep`, a loss that never holds
all logits, AdamW on the adapters. Only the attention differs; the third line adds the selection loss, for an answer of
32 tokens, and the fourth is such a step with the full cache: the default objective takes the two in turns. Dense is
the kernel that `scaled_dot_product_attention` picks. Needs torch and transformers only.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import measure
from lrsa import LRSAConfig, apply_lrsa, remove_lrsa
from train.selection_loss import SelectionSupervision

# layers, hidden, MLP, query heads, KV heads, head dim, vocabulary
SHAPES = {
    "tiny": (2, 256, 688, 8, 2, 32, 1000),
    "small": (4, 512, 1376, 8, 2, 64, 1000),
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 64, 151936),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 128, 152064),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128, 128256),
}

PARTS = {  # of a step, by words in the names of its operators
    "attention and selection": ("lrsa", "scaled_dot_product", "flash", "topk", "sort"),
    "loss over the vocabulary": ("log_softmax", "logsoftmax", "nll", "cross_entropy"),
    "matrix products": ("mm", "linear"),
    "copies, casts, zeros": ("copy", "clone", "fill", "zero", "cat", "_to"),
}


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 16):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype, "bias": False}
        self.down, self.up = nn.Linear(linear.in_features, rank, **like), nn.Linear(rank, linear.out_features, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def random_model(options, positions: int) -> LlamaForCausalLM:
    """A model of the given shape (`options.shape, layers, device, dtype`) with random weights, attention "sdpa"."""
    layers, hidden, mlp, heads, kv_heads, channels, vocabulary = SHAPES[options.shape]
    config = LlamaConfig(
        num_hidden_layers=options.layers or layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=channels,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
    )
    with torch.device(options.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, options.dtype))
        model = LlamaForCausalLM(config).requires_grad_(False)
        torch.set_default_dtype(before)
    return model


def with_lora(model: LlamaForCausalLM, keep: bool) -> LlamaForCausalLM:
    """The model with trained adapters, changed in place; activations are kept, or recomputed in the backward."""
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    model.enable_input_require_grads()
    if not keep:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def loss_of(model, ids: torch.Tensor, rows: int = 2048, **options) -> torch.Tensor:
    """Mean next-token loss; logits exist for `rows` tokens at a time only, in the backward too."""

    def part(states, labels):
        return nn.functional.cross_entropy(model.lm_head(states).float(), labels, reduction="sum")

    states = model.model(ids, use_cache=False, **options).last_hidden_state[0, :-1]
    labels = ids[0, 1:]
    sums = [
        checkpoint(part, states[i : i + rows], labels[i : i + rows], use_reentrant=False)
        for i in range(0, len(labels), rows)
    ]
    return torch.stack(sums).sum() / len(labels)


def taught_loss(model, ids: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """The loss with the selection loss, for the queries of an answer at the end of the row."""
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    predicting[:, -32:] = True
    supervision = SelectionSupervision(config, predicting, layers=range(model.config.num_hidden_layers))
    loss = loss_of(apply_lrsa(model, config), ids, lrsa_supervision=supervision)
    supervision.scale_with(loss)
    return loss


def step(loss, optimiser) -> None:
    """Forward, backward and update; `loss()` does the forward."""
    loss().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def run_length(options, model, optimiser, length: int, config: LRSAConfig) -> list[dict]:
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=options.device)
    sides = {
        "dense": lambda: loss_of(remove_lrsa(model), ids),
        "LRSA": lambda: loss_of(apply_lrsa(model, config), ids),
        "LRSA, selection loss": lambda: taught_loss(model, ids, config),
        "full cache, selection loss": lambda: taught_loss(model, ids, config.full()),
    }
    device = options.device
    times = measure.in_rounds(
        options.rounds, {name: partial(measure.seconds, device, step, loss, optimiser) for name, loss in sides.items()}
    )
    return [
        {
            "length": length,
            "name": name,
            "tokens_per_s": length / statistics.median(times[name]),
            "peak_gib": measure.peak_bytes(step, loss, optimiser, device=device) / 2**30,
        }
        | measure.ratio(times["dense"], times[name])
        for name, loss in sides.items()
    ]


def parts_of(options, model, optimiser, length: int, config: LRSAConfig) -> str:
    """Where the time of a step goes, by torch's profiler: own time of the operators."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=options.device)
    sides = {
        "dense": lambda: loss_of(remove_lrsa(model), ids),
        "LRSA": lambda: loss_of(apply_lrsa(model, config), ids),
        "LRSA, selection loss": lambda: taught_loss(model, ids, config),
    }
    shares = {}
    for name, loss in sides.items():
        step(loss, optimiser)
        with torch.profiler.profile() as profile:
            step(loss, optimiser)
        times = Counter()
        for event in profile.key_averages():
            times[_part(event.key)] += event.self_cpu_time_total + event.self_device_time_total
        shares[name] = {part: time / sum(times.values()) for part, time in times.items()}
    lines = [f"| {length} tokens, share of the time | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for part in (*PARTS, "other"):
        lines.append(f"| {part} | " + " | ".join(f"{shares[name].get(part, 0):.0%}" for name in sides) + " |")
    return "\n".join(lines)


def _part(operator: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in operator.lower() for word in words)), "other")


def table(rows: list[dict]) -> str:
    head = "| tokens | step | tokens/s | times dense (lowest-highest) | peak GiB |\n|---|---|---|---|---|\n"
    lines = [
        f"| {r['length']} | {r['name']} | {r['tokens_per_s']:.0f} | {measure.cell(r)} | {r['peak_gib']:.2f} |\n"
        for r in rows
    ]
    return head + "".join(lines)


def main() -> None:
    parser = measure.parser_of(
        __doc__, "step.json and step.md", rounds=3, setting="512:128" if measure.ON_GPU else "256:64",
        dtype="bfloat16" if measure.ON_GPU else "float32",
    )  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b" if measure.ON_GPU else "tiny")
    parser.add_argument("--keep", action="store_true", help="keep activations instead of computing them again")
    parser.add_argument("--split", action="store_true", help="also say where the time goes, by torch's profiler")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to fit a small machine")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[16384, 65536] if measure.ON_GPU else [2048, 4096, 8192]
    )
    options = measure.start(parser)
    model = with_lora(random_model(options, max(options.lengths)), options.keep)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = []
    for length in options.lengths:
        rows += run_length(options, model, optimiser, length, measure.config_of(options, options.setting))
        print("\n".join(table(rows).splitlines()[-4:]), flush=True)
        if options.split:
            print(parts_of(options, model, optimiser, length, measure.config_of(options, options.setting)), flush=True)
    measure.save(options, "step", rows, table(rows))
    print(
        f"\n{measure.machine(options.device)}, torch {torch.__version__}, {options.shape}, lag:top_k {options.setting}"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
