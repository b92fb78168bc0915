"""A run's prediction for people: tables on the terminal, one line for the banner, JSON for programs."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from train.estimate.advice import helpful_changes
from train.estimate.duration import Duration, pairs, predict_duration
from train.estimate.memory import Memory, predict_memory
from train.estimate.plan import Plan
from train.failures import RunFailed, first_line

PARTS = {
    "weights": "frozen weights",
    "adapter": "LoRA: weights, gradients, AdamW",
    "kept": "activations kept for the backward pass",
    "mlp": "at work: one MLP",
    "attention": "at work: one attention",
    "loss": "at work: the loss",
    "margin": "margin (assumed)",
}


def fits(plan: Plan) -> bool:
    """Whether the device has the memory that is predicted."""
    return predict_memory(plan).total <= plan.device.memory


def print_report(console: Console, plan: Plan) -> None:
    """Memory and time, dense against LRSA, and what to change when it does not fit."""
    console.print(_memory_table(plan), _time_table(plan), Text(_assumptions(plan), style="dim"), sep="\n")
    changes = "\n".join(f"  {change}" for change in helpful_changes(plan))
    if fits(plan):
        console.print(f"It fits: {_of_device(plan)}.", style="bold green")
        console.print(f"What would lower it further (GiB per device):\n{changes}", markup=False, soft_wrap=True)
    else:
        console.print(f"It does not fit: {_of_device(plan)}.", style="bold red")
        console.print(f"What helps most (predicted GiB per device):\n{changes}", markup=False, soft_wrap=True)


def report_dict(plan: Plan) -> dict:
    """The same as plain values: memory in GiB, time in seconds."""
    sides = {}
    for name, side in {"lrsa": plan, "dense": plan.dense()}.items():
        seconds = predict_duration(side)
        time = None if seconds is None else asdict(seconds) | {"step": seconds.total, "run": _run(plan, seconds)}
        sides[name] = {"memory_gib": predict_memory(side).to_dict(), "seconds": time, "pairs": pairs(side)}
    return {
        "fits": fits(plan),
        "device": plan.device.name,
        "device_gib": plan.device.memory / 2**30,
        "plan": {k: v for k, v in asdict(plan).items() if k not in ("shape", "device")},
        "changes": [{"set": c.text, "gib": c.total / 2**30} for c in helpful_changes(plan)],
        **sides,
    }


def memory_line(plan: Plan) -> str:
    """For the banner."""
    found = predict_memory(plan)
    working = max(found.mlp, found.attention, found.loss)
    sizes = {"weights": found.weights, "adapter": found.adapter, "kept activations": found.kept, "at work": working}
    details = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
    share = f"about {_gib(found.total)} of {_gib(plan.device.memory)} GiB per device predicted"
    return f"{share} ({details}, and a margin)"


def time_line(plan: Plan) -> str | None:
    """For the banner; None on a device whose speed is not known."""
    found = predict_duration(plan)
    if found is None:
        return None
    whole = "" if plan.steps is None else f", {_span(_run(plan, found))} in all"
    return f"about {_span(found.total)} per step{whole}, if {plan.device.name} reaches the efficiency that is assumed"


def out_of_memory(plan: Plan | str, error: RuntimeError) -> RunFailed:
    """The error to raise instead.

    Args:
        plan: of the run that failed, or the reason why there is none.
        error: what PyTorch raised.
    """
    lines = [f"out of memory: {first_line(error)}"]
    if isinstance(plan, str):
        changes = [
            "train.activation_checkpointing=true",
            "train.per_device_train_batch_size=1 (and a larger train.gradient_accumulation_steps)",
            "a lower data.context_length",
        ]
        lines.append(f"memory is not predicted here: {plan}")
    else:
        changes = helpful_changes(plan)
        lines.append(f"memory: {memory_line(plan)}")
    lines.append("what helps most, with the memory per device that it is predicted to need:")
    return RunFailed("\n".join(lines + [f"  --set {change}" for change in changes]))


def _memory_table(plan: Plan) -> Table:
    table = Table(title=f"memory per device, GiB: {_run_text(plan)}", title_justify="left")
    table.add_column("")
    for name in ("LRSA", "dense"):
        table.add_column(name, justify="right")
    both = [predict_memory(plan), predict_memory(plan.dense())]
    for name, text in PARTS.items():
        table.add_row(text, *(_part(found, name) for found in both))
    table.add_row("total", *(_gib(found.total) for found in both), style="bold")
    table.caption = "Of the three at work only the largest counts; the others are in brackets."
    return table


def _part(found: Memory, name: str) -> str:
    size = getattr(found, name)
    working = ("mlp", "attention", "loss")
    counts = name not in working or name == max(working, key=lambda other: getattr(found, other))
    return _gib(size) if counts else f"({_gib(size)})"


def _time_table(plan: Plan) -> Group | Table:
    both = [predict_duration(side) for side in (plan, plan.dense())]
    if both[0] is None:
        return Group(Text(f"no time: the speed of {plan.device.name} is not known"))
    table = Table(title=f"time of a step of {plan.rows_per_step} rows", title_justify="left")
    table.add_column("")
    for name in ("LRSA", "dense"):
        table.add_column(name, justify="right")
    names = {
        "linear": "projections, LoRA, loss",
        "attention": "attention",
        "exchange": "all-to-all between devices",
        "gather": "weights gathered, not hidden",
    }
    for name, text in names.items():
        table.add_row(text, *(_span(getattr(found, name)) for found in both))
    table.add_row("step", *(_span(found.total) for found in both), style="bold")
    steps = plan.steps or 1000
    whole = f"run of {steps} steps" if plan.steps else "1000 steps (the data decides how many)"
    table.add_row(whole, *(_span(steps * found.total) for found in both), style="bold")
    return table


def _run(plan: Plan, found: Duration) -> float | None:
    return plan.steps and plan.steps * found.total


def _run_text(plan: Plan) -> str:
    shared = f", {plan.sp_size} devices share a row" if plan.sp_size > 1 else ""
    zero = f", ZeRO-{plan.zero_stage}" if plan.zero_stage else ""
    policy = "every layer computed again" if plan.checkpointing else "no checkpointing"
    rows = f"{plan.batch} rows of {plan.length} tokens at a time"
    return f"{plan.gpus} x {plan.device.name}{zero}{shared}, {rows}, {policy}"


def _assumptions(plan: Plan) -> str:
    device, ratio = plan.device, pairs(plan.dense()) / pairs(plan)
    lines = [
        f"Every row is taken as {plan.length} tokens long. LRSA attention: at most {ratio:.2f} times dense's speed."
    ]
    if plan.teacher:
        lines.append("Each step of LRSA also runs the base model with its full cache, the teacher; dense has none.")
    if plan.keep_ratios:
        lines.append(f"Steps draw keep ratios {', '.join(f'{r:g}' for r in plan.keep_ratios)}; times are their mean.")
    if device.flops is not None:
        what = "measured by a matrix product" if device.on_cpu else "of the data sheet"
        lines.append(
            f"Assumed, not measured: layers reach {device.linear:.0%} and flash attention {device.attention:.0%} of "
            f"{device.flops / 1e12:.3g} TFLOP/s ({what}), and LRSA 87% of what its pairs allow."
        )
    return "\n".join(lines)


def _of_device(plan: Plan) -> str:
    return f"{_gib(predict_memory(plan).total)} of {_gib(plan.device.memory)} GiB on {plan.device.name}"


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.3f}"


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"
