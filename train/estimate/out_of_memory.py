"""The answer to a run that runs out of memory: what was predicted, and the three settings that help most."""

from __future__ import annotations

import torch

from train.estimate.advice import helpful_changes
from train.estimate.plan import Plan
from train.estimate.report import memory_line
from train.settings.errors import Problem, SettingsError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or, where PyTorch has no type for it, a CPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory(plan: Plan | str, error: RuntimeError) -> SettingsError:
    """The error to raise instead.

    Args:
        plan: of the run that failed, or the reason why there is none.
        error: what PyTorch raised.
    """
    lines = [f"out of memory: {str(error).splitlines()[0]}"]
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
    return SettingsError([Problem("", "", "\n".join(lines + [f"  --set {change}" for change in changes]))])
