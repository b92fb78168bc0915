"""A summary of the run, printed before training."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from data import DataReport
from lrsa.attention.api import describe
from lrsa.hf import sliding_windows
from train.estimate.devices import this_device
from train.estimate.plan import Plan, plan_run, shape_of, size_of
from train.estimate.report import memory_line
from train.settings.load import RunSettings
from train.settings.schema import ObjectiveSettings
from train.trainer import LRSATrainer, kept_tokens

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def print_banner(console: Console, settings: RunSettings, trainer: LRSATrainer, report: DataReport) -> None:
    """Show model, trainable share, compression, effective batch, data, steps and machine."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts(settings, trainer, report):
        table.add_row(name, escape(value))
    title = "LoRA under LRSA" if trainer.lrsa is not None else "dense LoRA (control): same data, seed and steps"
    console.print(Panel(table, title=f"training the {title}", title_align="left", expand=False))


def facts(settings: RunSettings, trainer: LRSATrainer, report: DataReport) -> list[tuple[str, str]]:
    """The banner's lines as `(name, text)`."""
    sizes = [(size_of(p), p.requires_grad) for p in trainer.model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    args, rows = trainer.args, report.rows if report.streaming else len(trainer.train_dataset)
    groups = args.world_size // settings.parallel.sp_size
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * groups
    per_epoch = math.ceil(math.ceil(rows / (args.per_device_train_batch_size * groups))
                          / args.gradient_accumulation_steps)  # fmt: skip
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    if groups < args.world_size:
        processes = f"{groups} {'group' if groups == 1 else 'groups'} of sp_size {settings.parallel.sp_size}"
    limit = trainer.time_limit.minutes
    minutes = "" if limit is None else f"as many as {limit:g} minutes allow, at most "
    packed = " looked at, more are made as they are needed" if report.streaming else ""
    packed = f", packed into {rows}" if args.packing and not report.streaming else packed
    epochs = "" if report.streaming else f"{steps / max(per_epoch, 1):.2f} epochs, "
    lines = [
        ("model", f"{settings.model.name_or_path}, {_count(total)} parameters in {settings.model.weights}"),
        ("adapter", f"LoRA r {settings.lora.r} on {_targets(trainer)}; {_count(trainable)} parameters trained "
                    f"({trainable / total:.2%})"),
        ("attention", _attention(settings, trainer)),
        *([("objective", _objective(settings.objective))] if trainer.lrsa is not None else []),
        ("batch", f"{args.per_device_train_batch_size} per device x {args.gradient_accumulation_steps} accumulated x "
                  f"{processes} = {per_step} rows per step"),
        ("data", f"{report.rows} rows{packed}, {report.compressed_share:.1%} long enough to be compressed"),
        ("steps", f"{minutes}{steps}, {epochs}learning rate {args.learning_rate:g}"),
        ("machine", _machine(trainer)),
        ("memory", _memory(settings, trainer, report)),
        ("output", str(args.output_dir)),
    ]  # fmt: skip
    if (warmup := args.get_warmup_steps(steps)) >= steps:
        text = f"a warmup of {warmup} steps never reaches train.learning_rate in {steps} steps: lower it"
        lines.append(("warning", text))
    positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and report.lengths["longest"] > positions:
        text = f"rows of up to {report.lengths['longest']:.0f} tokens exceed the model's {positions} positions"
        lines.append(("warning", f"{text}: lower data.context_length, or set model.rope_scaling"))
    return lines


def plan_of(settings: RunSettings, trainer: LRSATrainer) -> Plan | str:
    """What the memory of a run is predicted from, or the reason why it cannot be."""
    args, local = trainer.args, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = this_device(local, use_cpu=args.device.type == "cpu")
    try:
        plan = plan_run(settings, shape_of(trainer.model, settings.lora.r), device, args.world_size)
    except ValueError as error:
        return str(error)
    return plan if trainer.lrsa is not None else plan.dense()


def _memory(settings: RunSettings, trainer: LRSATrainer, report: DataReport) -> str:
    plan = plan_of(settings, trainer)
    if isinstance(plan, str):
        return f"not predicted: {plan}"
    return memory_line(plan if trainer.args.packing else replace(plan, length=int(report.lengths["longest"])))


def _attention(settings: RunSettings, trainer: LRSATrainer) -> str:
    lrsa = trainer.lrsa
    if lrsa is None:
        return "dense causal"
    windows = sliding_windows(trainer.model.config)
    length = settings.data.context_length
    kept = kept_tokens([length], lrsa, windows)
    skipped = f", layers {', '.join(map(str, lrsa.skip_layers))} dense" if lrsa.skip_layers else ""
    sliding = sum(window is not None for window in windows)
    skipped += f", {sliding} of {len(windows)} layers keep their sliding window" if sliding else ""
    text = trainer.model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    capped = "whole" if getattr(text, "attn_logit_softcapping", None) else None
    kind = trainer.args.device.type, PRECISIONS[_precision(trainer)], head_dim, capped
    implementation = describe(settings.model.attention, *kind)
    return (
        f"LRSA, sink {lrsa.sink_size}, lag {lrsa.lag_size}, top_k {lrsa.top_k} (keep ratio {lrsa.keep_ratio:g})"
        f"{skipped}; after {length} tokens the cache holds {kept:.0f} ({kept / length:.1%}); "
        f"implementation: {implementation}"
    )


def _targets(trainer: LRSATrainer) -> str:
    """The modules that carry LoRA, counted by name: `24 q_proj, 24 v_proj`."""
    counts = Counter(name.rpartition(".")[2] for name in trainer.model.base_model.targeted_module_names)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _objective(objective: ObjectiveSettings) -> str:
    weights = {name: getattr(objective, name) for name in ("cross_entropy", "distillation", "selection")}
    parts = " + ".join(f"{weight:g} {name.replace('_', '-')}" for name, weight in weights.items() if weight)
    teacher = "; teacher: the base model with its full cache (one more forward)" if objective.distillation else ""
    ratios = ", ".join(f"{ratio:g}" for ratio in objective.keep_ratios or [])
    how = "one sampled per step" if objective.schedule == "draw" else "in order, equal numbers of steps"
    return f"{parts}{teacher}; keep ratios {ratios}, {how}"


def _machine(trainer: LRSATrainer) -> str:
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return f"{name}, {_precision(trainer)}" + (f", DeepSpeed ZeRO-{plugin.zero_stage}" if plugin is not None else "")


def _precision(trainer: LRSATrainer) -> str:
    return "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32"


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
