"""Predicted memory for people: a table on the terminal, one line for the banner, JSON for programs."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.estimate.advice import helpful_changes
from train.estimate.memory import Memory, predict_memory
from train.estimate.plan import Plan
from train.failures import RunFailed, first_line

WORKING = {"mlp": "MLP", "attention": "attention", "loss": "loss"}
PARTS = {
    "weights": "frozen weights",
    "adapter": "LoRA: weights, gradients, AdamW",
    "kept": "activations kept for the backward pass",
    **{name: f"peak working set: {text}" for name, text in WORKING.items()},
    "margin": "margin (assumed)",
}


def fits(plan: Plan) -> bool:
    """Whether the device has the memory that is predicted."""
    return predict_memory(plan).total <= plan.device.memory


def print_report(console: Console, plan: Plan) -> None:
    """Memory, LRSA against dense, and what to change when it does not fit."""
    console.print(_memory_table(plan))
    console.print(Text(f"Every row is taken as {plan.length} tokens long.", style="dim"))
    if fits(plan):
        console.print(f"It fits: {_of_device(plan)}.", style="bold green")
        console.print("Changes that lower it further (predicted GiB per device):")
    else:
        console.print(f"It does not fit: {_of_device(plan)}.", style="bold red")
        console.print("Changes that help most (predicted GiB per device):")
    for change in helpful_changes(plan):
        console.print(f"  {change}", markup=False, soft_wrap=True)


def report_dict(plan: Plan) -> dict:
    """The same as plain values; memory in GiB."""
    return {
        "fits": fits(plan),
        "device": plan.device.name,
        "device_gib": plan.device.memory / 2**30,
        "plan": {k: v for k, v in asdict(plan).items() if k not in ("shape", "device")},
        "changes": [{"set": c.text, "gib": c.total / 2**30} for c in helpful_changes(plan)],
        "lrsa": {"memory_gib": predict_memory(plan).to_dict()},
        "dense": {"memory_gib": predict_memory(plan.dense()).to_dict()},
    }


def memory_line(plan: Plan) -> str:
    """For the banner."""
    memory = predict_memory(plan)
    sizes = {
        "weights": memory.weights,
        "adapter": memory.adapter,
        "kept activations": memory.kept,
        f"peak working set ({WORKING[memory.largest]})": getattr(memory, memory.largest),
    }
    details = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
    return f"predicted {_of_device(plan)}: {details}, and a margin"


def out_of_memory(plan: Plan | str, error: RuntimeError) -> RunFailed:
    """The error to raise instead.

    Args:
        plan: of the run that failed, or the reason why there is none.
        error: what PyTorch raised.
    """
    lines = [f"Out of memory: {first_line(error)}"]
    if isinstance(plan, str):
        changes = [
            "train.activation_checkpointing=true",
            "train.per_device_train_batch_size=1 (and a larger train.gradient_accumulation_steps)",
            "a lower data.context_length",
        ]
        lines.append(f"Memory is not predicted here: {plan}")
    else:
        changes = helpful_changes(plan)
        lines.append(f"Memory: {memory_line(plan)}")
    lines.append("Changes that help most, with the predicted memory per device:")
    return RunFailed("\n".join(lines + [f"  --set {change}" for change in changes]))


def _memory_table(plan: Plan) -> Table:
    table = Table(title=f"memory per device, GiB: {_run_text(plan)}", title_justify="left")
    table.add_column("")
    for name in ("LRSA", "dense"):
        table.add_column(name, justify="right")
    both = [predict_memory(plan), predict_memory(plan.dense())]
    for name, text in PARTS.items():
        table.add_row(text, *(_part(memory, name) for memory in both))
    table.add_row("total", *(_gib(memory.total) for memory in both), style="bold")
    table.caption = "Only the largest peak working set counts; the others are in brackets."
    return table


def _part(memory: Memory, name: str) -> str:
    size = _gib(getattr(memory, name))
    return f"({size})" if name in WORKING and name != memory.largest else size


def _run_text(plan: Plan) -> str:
    shared = f", sequence-parallel groups of {plan.sp_size}" if plan.sp_size > 1 else ""
    zero = f", ZeRO-{plan.zero_stage}" if plan.zero_stage else ""
    checkpointing = "activation checkpointing" if plan.checkpointing else "no activation checkpointing"
    rows = f"{plan.batch} rows of {plan.length} tokens at a time"
    return f"{plan.gpus} x {plan.device.name}{zero}{shared}, {rows}, {checkpointing}"


def _of_device(plan: Plan) -> str:
    return f"{_gib(predict_memory(plan).total)} of {_gib(plan.device.memory)} GiB per {plan.device.name}"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.3f}"
