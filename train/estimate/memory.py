"""Memory of one device at its fullest moment, from what PyTorch's autograd keeps of a transformer layer.

    weights + adapter + kept + the largest of (MLP, attention, loss) + margin

"Kept" is what is stored for the backward pass: with checkpointing only each layer's input. Then one of three moments
needs most: the backward pass of one layer's MLP or of its attention (for which a checkpointed layer has been
recomputed), or the loss. The sizes below were read off autograd's saved tensors and checked against the allocator's
events (tests/train/estimate/test_estimate.py). Flash attention and LRSA are both linear in the length; only details
differ.

Per token: `h` hidden, `m` MLP, `q` and `g` all channels of the query heads and of the KV heads, `e` bytes per element.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from train.estimate.plan import ATTENTION, MLP, Plan
from train.objective import LOGITS

# TRL scores this many tokens against this many words at a time (trl.kernels.chunked_logprob, trl.trainer.utils).
LOGITS_TILE = (4096, 32768)
# What TRL's loss keeps beside a tile on a CPU, where no fused kernel exists: seven fp32 tiles and a mask.
CPU_TILE_BYTES = 29
# Bytes for each of the logits that distillation holds at once (train.objective), of teacher, student and gradient.
DISTILLED_LOGIT_BYTES = 20
# Assumptions: the CUDA context and libraries, and what fragmentation wastes of all that is allocated.
CUDA_CONTEXT = 2**30
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Of `mlp`, `attention` and `loss` only the largest counts: they are different moments."""

    weights: float
    adapter: float
    kept: float
    mlp: float
    attention: float
    loss: float
    margin: float

    @property
    def allocated(self) -> float:
        """The most that PyTorch allocates at once."""
        return self.weights + self.adapter + self.kept + getattr(self, self.largest)

    @property
    def largest(self) -> str:
        """Which of `mlp`, `attention` and `loss` needs most."""
        return max(("mlp", "attention", "loss"), key=lambda name: getattr(self, name))

    @property
    def total(self) -> float:
        """What the device must have."""
        return self.allocated + self.margin

    def to_dict(self) -> dict[str, float]:
        """All numbers in GiB."""
        return {name: size / 2**30 for name, size in (asdict(self) | {"total": self.total}).items()}


def predict_memory(plan: Plan) -> Memory:
    """Memory of one device."""
    layer, mlp_part = _saved_by_layer(plan)
    tokens, checkpoint = plan.tokens, plan.tokens * plan.shape.hidden * plan.bytes
    layers = min(2, plan.shape.layers) if plan.offloading else plan.shape.layers
    if plan.checkpointing:
        # In fp32 the first norm keeps the layer's input itself, which is there already.
        recomputed = tokens * layer - (checkpoint if plan.bytes == 4 else 0)
        kept = layers * checkpoint
    else:
        recomputed, kept = 0.0, layers * tokens * layer
    if plan.selection:
        kept += plan.shape.layers * tokens * 4 * plan.shape.kv_heads  # the targets of the selection loss
    parts = {
        "weights": _weights(plan),
        "adapter": _adapter(plan),
        "kept": kept,
        "mlp": recomputed + tokens * _mlp_working(plan),
        # By then the MLP's part of the layer is gone.
        "attention": max(0.0, recomputed + tokens * (_attention_working(plan) - mlp_part)),
        "loss": _loss(plan),
    }
    allocated = Memory(**parts, margin=0.0).allocated
    context = 0 if plan.device.on_cpu else CUDA_CONTEXT
    return Memory(**parts, margin=context + FRAGMENTATION * allocated)


def _weights(plan: Plan) -> float:
    """Frozen weights, or a device's part of them and what ZeRO-3 gathers for the layers being computed."""
    whole = plan.shape.parameters * plan.bytes
    if plan.packed_bytes is not None:  # and one matrix unpacked
        unpacked = plan.shape.hidden * plan.shape.mlp * plan.bytes
        return whole - plan.shape.linear * (plan.bytes - plan.packed_bytes) + unpacked
    if plan.zero_stage < 3:
        return whole
    gathered = min(whole, max(plan.live, plan.shape.largest) * plan.bytes)
    return gathered if plan.offload_weights else gathered + whole / plan.gpus


def _adapter(plan: Plan) -> float:
    """The adapter's weights, gradients and AdamW's state: two numbers each, and an fp32 copy in half precision."""
    whole = plan.shape.lora_parameters
    size = 4 if plan.autocast else plan.bytes
    state = 8 if size == 4 else 12
    parts = plan.gpus if plan.zero_stage >= 2 else 1
    weights = whole * size / (plan.gpus if plan.zero_stage == 3 else 1)
    return weights + whole * size / parts + (0 if plan.offload_optimizer else whole * state / parts)


def _saved_by_layer(plan: Plan) -> tuple[float, float]:
    """Bytes per token that autograd keeps of a layer, and how much of that is gone when its attention's turn comes."""
    s, e = plan.shape, plan.bytes
    q, g = s.heads * s.head_dim, _kv_channels(plan)
    norm = 4 * s.hidden  # the input in fp32; in an fp32 model the residual itself
    attention = norm + e * (2 * q + 2 * g) + 4 * s.heads + e * s.rank * len(s.targets & set(ATTENTION))
    if s.qk_norm:
        attention += 4 * (q + g)
    if plan.lrsa is not None:
        attention += 8 * s.kv_heads * plan.lrsa.keep_ratio  # positions of the kept tokens
    if plan.selection:
        attention += 16 * g  # keys and values in fp32, as they are and normalised, for the gradient of their scores
    mlp = norm + 3 * e * s.mlp + e * s.rank * len(s.targets & set(MLP))
    attention += _adapter_inputs(plan, ATTENTION)
    mlp += _adapter_inputs(plan, MLP)
    return attention + mlp, mlp


def _adapter_inputs(plan: Plan, projections: tuple[str, ...]) -> float:
    """Inputs that LoRA's first matrix keeps. Projections share them; casts and dropout make a copy for each."""
    s = plan.shape
    targets = [name for name in projections if name in s.targets]
    if plan.autocast or plan.dropout:
        return sum(s.width_in(name) for name in targets) * (plan.bytes + plan.dropout)
    shared = {"hidden" if s.width_in(n) == s.hidden and n not in ("o_proj", "down_proj") else n for n in targets}
    # The input of o_proj is the output of attention, which attention keeps anyway.
    return plan.bytes * sum(s.hidden if n == "hidden" else s.width_in(n) for n in shared - {"o_proj"})


def _mlp_working(plan: Plan) -> float:
    """Gradients in the backward pass of an MLP; with autocast also the fp32 input of the adapter."""
    cast = plan.bytes if plan.autocast else 0
    return plan.shape.mlp * (2 * plan.bytes + cast) + plan.shape.hidden * (2 * plan.bytes + 3.5 * cast)


def _attention_working(plan: Plan) -> float:
    """Gradients in the backward pass of attention; LRSA adds them up in fp32, flash on GPUs the queries'."""
    q, g, e = plan.shape.heads * plan.shape.head_dim, _kv_channels(plan), plan.bytes
    exchanged = 0 if plan.sp_size == 1 else e * (q + 2 * g)  # send or receive buffer of an all-to-all
    if plan.lrsa is None:
        return exchanged + q * (3 * e + (0 if plan.device.on_cpu else 4)) + g * 2 * e
    return exchanged + q * (4 + 3 * e) + g * (6 + 5 * e + 2 * e * plan.lrsa.keep_ratio)


def _kv_channels(plan: Plan) -> float:
    """Channels of keys; with more devices in a group than KV heads, heads are copied."""
    return max(plan.shape.kv_heads, plan.sp_size) * plan.shape.head_dim


def _loss(plan: Plan) -> float:
    """TRL's loss holds one tile of logits, never all; then the last norm's backward pass."""
    rows, columns = LOGITS_TILE
    tile = min(rows, plan.tokens) * columns * plan.bytes
    if plan.device.on_cpu:
        tile += min(rows, plan.tokens) * min(columns, plan.shape.vocabulary) * CPU_TILE_BYTES
    if plan.distillation:
        tile = max(tile, min(LOGITS, plan.tokens * plan.shape.vocabulary) * DISTILLED_LOGIT_BYTES)
    hidden = plan.tokens * plan.shape.hidden
    return max(tile + hidden * (8 + 2 * plan.bytes), hidden * (16 + plan.bytes))
