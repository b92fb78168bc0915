"""Time of one step: operations over what the device reaches, plus what the devices send each other.

LoRA needs no weight gradients of the frozen projections: a layer costs one forward and one backward of the inputs (and
one more forward when it is computed again). The elementwise rest of a layer is part of the assumed efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrsa import LRSAConfig
from train.estimate.devices import GPUS_PER_NODE, LINK_EFFICIENCY, LRSA_EFFICIENCY
from train.estimate.plan import Plan


@dataclass(frozen=True)
class Duration:
    """Seconds of one step.

    Attributes:
        linear: projections, adapter and loss; attention: query-key pairs.
        exchange: all-to-all of sequence parallelism, which nothing hides.
        gather: weights that ZeRO-3 collects, as far as they take longer than the computation that hides them.
    """

    linear: float
    attention: float
    exchange: float
    gather: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.exchange + self.gather


def predict_duration(plan: Plan) -> Duration | None:
    """Seconds of one step, None on a device whose speed is not known."""
    device = plan.device
    if device.flops is None:
        return None
    linear = linear_flops(plan) / (device.flops * device.linear)
    reached = device.attention * (1.0 if plan.lrsa is None else LRSA_EFFICIENCY)
    attention = attention_flops(plan) / (device.flops * reached)
    exchange = exchange_bytes(plan) * plan.shape.layers * plan.accumulation / _link(plan, plan.sp_size)
    gather = _gathered_bytes(plan) * plan.accumulation / _link(plan, plan.gpus)
    return Duration(linear, attention, exchange, max(0.0, gather - linear - attention))


def linear_flops(plan: Plan) -> float:
    """Operations of one device in one step, all but attention."""
    s = plan.shape
    again = 1 if plan.checkpointing else 0
    frozen = 2 * s.layers * s.layer_weights * (2 + again + plan.teacher)
    adapter = 2 * s.lora_parameters * (3 + again)
    head = 2 * s.hidden * s.vocabulary * 3  # the loss computes its logits once more in the backward pass
    return plan.tokens * plan.accumulation * (frozen + adapter + head)


def attention_flops(plan: Plan) -> float:
    """Operations of one device in one step: two matrix products a pair forward, five backward."""
    s = plan.shape
    products = (2 + 5 + (2 if plan.checkpointing else 0)) * pairs(plan)
    if plan.teacher:
        products += 2 * pairs(plan.dense())
    return 2 * products * s.layers * s.heads * s.head_dim * plan.batch * plan.accumulation / plan.sp_size


def pairs(plan: Plan) -> float:
    """Query-key pairs of one row and head, as a mean over the layers and the keep ratios that are trained."""
    configs = [plan.lrsa and plan.lrsa.with_keep_ratio(ratio) for ratio in plan.keep_ratios] or [plan.lrsa]
    found = [
        _pairs(plan.length, config and config.for_layer(layer), window)
        for layer, window in enumerate(plan.shape.windows)
        for config in configs
    ]
    return sum(found) / len(found)


def _pairs(n: int, lrsa: LRSAConfig | None, window: int | None) -> float:
    if window and window < n:
        return window * n - window * (window - 1) / 2
    if lrsa is None or lrsa.top_k == lrsa.lag_size or n <= lrsa.dense_length:
        return n * (n + 1) / 2
    keep, lag, sink = lrsa.keep_ratio, lrsa.lag_size, lrsa.sink_size
    return keep * n**2 / 2 + 1.5 * (1 - keep) * lag * n + sink * n


def exchange_bytes(plan: Plan) -> float:
    """Bytes that a device sends for one layer and micro-batch in Ulysses' all-to-alls: queries, keys and values to the
    devices that hold their heads, and the output back; once more backward, when it is computed again, and for the
    teacher."""
    if plan.sp_size == 1:
        return 0.0
    s = plan.shape
    channels = s.head_dim * (2 * s.heads + 2 * max(s.kv_heads, plan.sp_size))
    passes = 2 + plan.checkpointing + plan.teacher
    return passes * plan.tokens * channels * plan.bytes * (plan.sp_size - 1) / plan.sp_size


def _gathered_bytes(plan: Plan) -> float:
    """Weights that ZeRO-3 collects for one micro-batch: for the forward, the backward and the teacher's pass."""
    if plan.zero_stage < 3:
        return 0.0
    return (2 + plan.teacher) * plan.shape.parameters * plan.bytes * (plan.gpus - 1) / plan.gpus


def _link(plan: Plan, together: int) -> float:
    """Bytes per second between devices that work together: the network's as soon as they fill more than a node."""
    return LINK_EFFICIENCY * (plan.device.link if together <= GPUS_PER_NODE else plan.device.network)
