"""What to change in a run that does not fit, with the memory that it would then need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.estimate.memory import predict_memory
from train.estimate.plan import NF4, Plan, sizes_of_sequence_groups


@dataclass(frozen=True)
class Change:
    """A change as a person would make it, the plan it leads to, and whether it changes what the model learns."""

    text: str
    plan: Plan
    other_result: bool = False

    @property
    def total(self) -> float:
        """Bytes of a device."""
        return predict_memory(self.plan).total

    def __str__(self) -> str:
        return f"{self.text}: {self.total / 2**30:.3g} GiB"


def helpful_changes(plan: Plan, count: int = 3) -> list[Change]:
    """The most useful changes that lower the memory: those that make it fit come first, then those that leave the
    training's result as it is, then those that save most."""
    now = predict_memory(plan).total
    changes = [change for change in _candidates(plan) if change.total < 0.99 * now]
    return sorted(changes, key=lambda c: (c.total > plan.device.memory, c.other_result, c.total))[:count]


def _candidates(plan: Plan) -> Iterator[Change]:
    if not plan.checkpointing:
        yield Change("train.activation_checkpointing=true", replace(plan, checkpointing=True))
    if plan.batch > 1:
        rows = plan.batch * plan.accumulation
        text = f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps={rows}"
        yield Change(text, replace(plan, batch=1, accumulation=rows))
    if not plan.device.on_cpu and not plan.offloading:
        yield Change("train.activation_offloading=true", replace(plan, offloading=True))
    if plan.zero_stage < 3 and plan.gpus > 1:
        text = "train.deepspeed=deepspeed/zero3.json"
        yield Change(text, replace(plan, zero_stage=3, autocast=False))
    yield from _larger_groups(plan)
    if plan.packed_bytes is None and plan.zero_stage < 3:
        yield Change("model.quantization=nf4", replace(plan, packed_bytes=NF4), other_result=True)
    half = max(plan.length // 2, 8)
    yield Change(f"data.context_length={half}", replace(plan, length=half), other_result=True)
    fewer = plan.shape.targets & {"q_proj", "v_proj"}
    if fewer != plan.shape.targets:
        share = len(fewer) / len(plan.shape.targets)
        shape = replace(
            plan.shape, targets=fewer or plan.shape.targets, lora_parameters=int(plan.shape.lora_parameters * share)
        )
        yield Change("lora.target_modules=[q_proj,v_proj]", replace(plan, shape=shape), other_result=True)


def _larger_groups(plan: Plan) -> Iterator[Change]:
    """The next larger sequence-parallel group; the number of rows per step stays the same."""
    if plan.device.on_cpu:
        return
    for gpus in (plan.gpus, 2 * plan.gpus):
        larger = [n for n in sizes_of_sequence_groups(plan.shape, gpus, plan.selection) if n > plan.sp_size]
        if larger:
            size = larger[0]
            text = f"parallel.sp_size={size}" + (f" on {gpus} GPUs" if gpus > plan.gpus else "")
            yield Change(text, replace(plan, sp_size=size, gpus=gpus))
            return
