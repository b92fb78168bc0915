"""The tables of docs/scaling.md: three model sizes, three lengths, 1 to 64 GPUs, dense against LRSA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lrsa import LRSAConfig
from train.estimate.devices import Device
from train.estimate.duration import exchange_bytes, predict_duration
from train.estimate.memory import predict_memory
from train.estimate.plan import ATTENTION, MLP, ModelShape, Plan, sizes_of_sequence_groups

RANK, ROWS = 16, 16
LENGTHS, GPUS = (131072, 524288, 1048576), (1, 2, 4, 8, 16, 32, 64)
LRSA = LRSAConfig(sink_size=16, lag_size=512, top_k=128)
# layers, hidden, MLP, query heads, KV heads, head dim, vocabulary: the models' published configurations
MODELS = {
    "7B (Qwen2.5-7B)": (28, 3584, 18944, 28, 4, 128, 152064),
    "32B (Qwen2.5-32B)": (64, 5120, 27648, 40, 8, 128, 152064),
    "70B (Llama-3.1-70B)": (80, 8192, 28672, 64, 8, 128, 128256),
}


def scaling_tables(device: Device) -> str:
    """Markdown: one table for each model, rows of length and GPUs."""
    parts = [
        f"Device: {device.name}, {device.memory / 2**30:.1f} GiB. LRSA: sink {LRSA.sink_size}, lag {LRSA.lag_size}, "
        f"top_k {LRSA.top_k}. LoRA r {RANK} on all projections, bf16,\ncheckpointing; a step is {ROWS} rows."
    ]
    for name, numbers in MODELS.items():
        parts.append(f"### {name}\n\n{_table(_shape(*numbers), device)}")
    return "\n\n".join(parts) + "\n"


def _table(shape: ModelShape, device: Device) -> str:
    lines = [
        "| tokens | GPUs | setting | GiB per GPU: LRSA | dense | fits | all-to-all, MiB per layer "
        "| hours per 1000 steps: LRSA | dense | times |",
        "|---:|---:|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for length in LENGTHS:
        for gpus in GPUS:
            plan = _best(shape, device, length, gpus)
            lines.append(_row(plan))
    return "\n".join(lines)


def _row(plan: Plan) -> str:
    sizes = [predict_memory(side).total for side in (plan, plan.dense())]
    fits = all(size <= plan.device.memory for size in sizes)
    lrsa, dense = (predict_duration(side).total * 1000 / 3600 for side in (plan, plan.dense()))
    setting = f"ZeRO-{plan.zero_stage}, sp {plan.sp_size}" + (", offload" if plan.offloading else "")
    hours = f"{lrsa:.3g} | {dense:.3g} | {dense / lrsa:.2f}" if fits else " |  | "
    return (
        f"| {plan.length // 1024}k | {plan.gpus} | {setting} | {sizes[0] / 2**30:.0f} | {sizes[1] / 2**30:.0f} "
        f"| {'yes' if fits else 'no'} | {exchange_bytes(plan) / 2**20:.0f} | {hours} |"
    )


def _best(shape: ModelShape, device: Device, length: int, gpus: int) -> Plan:
    """The fastest setting that fits; the smallest one when none does."""

    def rank(plan: Plan) -> tuple:
        size = max(predict_memory(side).total for side in (plan, plan.dense()))
        return (0, predict_duration(plan).total, plan.offloading) if size <= device.memory else (1, size)

    return min(_settings(shape, device, length, gpus), key=rank)


def _settings(shape: ModelShape, device: Device, length: int, gpus: int) -> Iterator[Plan]:
    plan = Plan(shape=shape, device=device, lrsa=LRSA, length=length, gpus=gpus, zero_stage=2)
    for sp_size in sizes_of_sequence_groups(shape, gpus, plan.selection):
        groups = gpus // sp_size
        if ROWS % groups:
            continue
        for stage in (2, 3) if gpus > 1 else (2,):
            for offloading in (False, True):
                yield replace(
                    plan, sp_size=sp_size, accumulation=ROWS // groups, zero_stage=stage, offloading=offloading
                )


def _shape(layers, hidden, mlp, heads, kv_heads, head_dim, vocabulary) -> ModelShape:
    q, g = heads * head_dim, kv_heads * head_dim
    ends = [hidden + q, hidden + g, hidden + g, q + hidden, *[hidden + mlp] * 3]
    shape = ModelShape(
        layers=layers, hidden=hidden, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocabulary=vocabulary, parameters=0, lora_parameters=RANK * layers * sum(ends), rank=RANK,
        targets=frozenset(ATTENTION + MLP), qk_norm=False, largest=vocabulary * hidden, windows=(None,) * layers,
    )  # fmt: skip
    return replace(shape, parameters=layers * shape.layer_weights + 2 * vocabulary * hidden)
