"""What the memory of a run follows from: the model's shape, read off its modules, and the plan of the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lrsa import LRSAConfig
from lrsa.hf import has_latents
from lrsa.hf.layers import is_recurrent
from train.estimate.devices import Device
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # with quantised scales


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs (Llama, Qwen, Mistral, ...) and a LoRA adapter on it.

    Attributes:
        hidden, mlp: width of the residual stream and of the MLP.
        heads, kv_heads, head_dim: of attention.
        parameters, lora_parameters: frozen ones and trained ones, of the whole model.
        rank: LoRA's `r`.
        targets: projections that carry LoRA, such as `q_proj`.
        qk_norm: whether queries and keys are normalised, as in Qwen3.
        largest: parameters of the largest module, which ZeRO-3 gathers at once.
        linear: parameters of the linear layers but the head, which a quantised base packs.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    lora_parameters: int
    rank: int
    targets: frozenset[str]
    qk_norm: bool
    largest: int
    linear: int = 0

    def width_in(self, projection: str) -> int:
        """Input channels of a projection."""
        return {"o_proj": self.heads * self.head_dim, "down_proj": self.mlp}.get(projection, self.hidden)


@dataclass(frozen=True)
class Plan:
    """A run on `gpus` devices, on rows of `length` tokens.

    Attributes:
        lrsa: the compression, or None for dense attention.
        batch: rows of a device at a time; with `sp_size` above 1, rows of a group of devices.
        bytes: of an element of the frozen weights and of activations.
        autocast: whether the adapter stays in fp32 and is cast at each use, as without DeepSpeed in half precision.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        offloading: whether what the backward pass needs waits in the memory of the host.
        zero_stage: 0 without DeepSpeed; 2 splits the optimiser's state and the gradients, 3 the weights too.
        offload_optimizer, offload_weights: whether they live in the memory of the host.
        live: parameters that ZeRO-3 gathers ahead, at most.
        packed_bytes: of an element of the linear layers, where bitsandbytes packs them.
        selection, distillation: whether a step learns from these, for which the base model runs first, full cache, no
            gradients.
    """

    shape: ModelShape
    device: Device
    lrsa: LRSAConfig | None
    length: int
    batch: int = 1
    accumulation: int = 1
    gpus: int = 1
    sp_size: int = 1
    bytes: int = 2
    autocast: bool = False
    dropout: bool = False
    checkpointing: bool = True
    offloading: bool = False
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    live: int = 10**9
    packed_bytes: float | None = None
    selection: bool = False
    distillation: bool = False

    @property
    def tokens(self) -> float:
        """Tokens that a device holds at a time."""
        return self.batch * self.length / self.sp_size

    def dense(self) -> Plan:
        """The same run with dense attention, which learns from cross-entropy alone."""
        return replace(self, lrsa=None, selection=False, distillation=False)


def shape_of(model: nn.Module, rank: int) -> ModelShape:
    """The shape of a PEFT model, on any device, `meta` included.

    Raises:
        ValueError: when its layers are not those of a decoder with gated MLPs.
    """
    config = model.config.get_text_config()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in ATTENTION + MLP if name not in names]
    if missing or is_recurrent(config):
        reason = "recurrent layers" if is_recurrent(config) else f"no {', '.join(missing)}"
        raise ValueError(
            f"{config.model_type} has {'latent attention (MLA) and ' * has_latents(model)}{reason}: memory is known "
            "for decoders with q, k, v, o, gate, up and down projections in every layer (Llama, Qwen2, Qwen3, "
            "Mistral, ...). To see what it needs, train two steps on the device: --set train.max_steps=2."
        )
    sizes = {name: size_of(p) for name, p in model.named_parameters()}
    trained = {name: sizes[name] for name, p in model.named_parameters() if p.requires_grad}
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        parameters=sum(sizes.values()) - sum(trained.values()),
        lora_parameters=sum(trained.values()),
        rank=rank,
        targets=frozenset(name.split(".lora_")[0].rpartition(".")[2] for name in trained),
        qk_norm="q_norm" in names,
        largest=max(sizes.values()),
        linear=sum(
            module.in_features * module.out_features
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name and module is not model.get_output_embeddings()
        ),
    )


def size_of(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also where ZeRO-3 holds a part of it or a quantised one packs them."""
    packed = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel() if packed is None else packed.shape.numel())


def shape_from_settings(settings: RunSettings) -> ModelShape:
    """The shape of the model and adapter that the settings name; only the model's config.json is read.

    Raises:
        SettingsError: when there is no such model, or its shape is not one that can be estimated.
    """
    from train.model import load_config

    return shape_from_config(load_config(settings.model), settings)


def shape_from_config(config, settings: RunSettings) -> ModelShape:
    """The same for a configuration that is already there."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from train.adapter import lora_config

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.model.trust_remote_code)
            model = get_peft_model(model, lora_config(settings.lora))
        return shape_of(model, settings.lora.r)
    except ValueError as error:
        raise SettingsError([Problem("", f"model.name_or_path {settings.model.name_or_path}", str(error))]) from error


def plan_run(
    settings: RunSettings,
    shape: ModelShape,
    device: Device,
    gpus: int = 1,
    *,
    sp_size: int | None = None,
    zero_stage: int | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        settings: with defaults filled in (`with_defaults`).
        gpus: processes, one for each device.
        sp_size: devices that share a row, instead of `parallel.sp_size`.
        zero_stage: instead of the one in the file that `train.deepspeed` names.

    Raises:
        SettingsError: when `gpus` and `sp_size` do not go together, or with the model's heads.
    """
    sp_size = sp_size or settings.parallel.sp_size
    _check_division(shape, gpus, sp_size, bool(settings.objective.selection))
    train, zero = settings.train, _zero_optimization(settings.train.deepspeed)
    stage = zero.get("stage", 0) if zero_stage is None else zero_stage
    size = BYTES[settings.model.dtype]
    half = bool(train.bf16 or train.fp16)
    live = zero.get("stage3_max_live_parameters", 10**9)
    return Plan(
        shape=shape,
        device=device,
        lrsa=settings.lrsa,
        length=settings.data.context_length,
        batch=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        gpus=gpus,
        sp_size=sp_size,
        bytes=size,
        packed_bytes=_packed_bytes(settings),
        autocast=half and stage == 0 and not train.deepspeed,
        dropout=settings.lora.lora_dropout > 0,
        checkpointing=train.activation_checkpointing,
        offloading=train.activation_offloading,
        zero_stage=stage,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_weights=stage == 3 and _offloaded(zero, "offload_param"),
        selection=bool(settings.objective.selection),
        distillation=bool(settings.objective.distillation),
        live=live if isinstance(live, (int, float)) else 10**9,
    )


def _check_division(shape: ModelShape, gpus: int, sp_size: int, selection: bool) -> None:
    sizes = sizes_of_sequence_groups(shape, gpus, selection)
    if sp_size not in sizes:
        multiple = "objective.selection allows no more" if selection else "or be a multiple of the KV heads"
        text = (
            f"must divide {gpus} devices, {shape.heads} query heads and {shape.kv_heads} KV heads ({multiple}), "
            f"got {sp_size}: choose one of {', '.join(map(str, sizes))}"
        )
        raise SettingsError([Problem("", "parallel.sp_size", text)])


def sizes_of_sequence_groups(shape: ModelShape, gpus: int, selection: bool) -> list[int]:
    """Numbers of devices that can share a row: every device gets whole query heads and whole KV heads, which are
    copied when there are fewer of them than devices; supervision of the selection refuses such copies."""
    fits = [n for n in range(1, gpus + 1) if gpus % n == 0 and shape.heads % n == 0]
    return [n for n in fits if shape.kv_heads % n == 0 or (n % shape.kv_heads == 0 and not selection)]


def _zero_optimization(deepspeed: str | dict | None) -> dict:
    if isinstance(deepspeed, str):
        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    return (deepspeed or {}).get("zero_optimization", {})


def _packed_bytes(settings: RunSettings) -> float | None:
    """Bytes of a quantised weight, with its share of the scales (bitsandbytes: a block of 64, 256 of these)."""
    if settings.model.quantization is None:
        return None
    if settings.model.quantization == "int8":
        return 1.0
    return NF4 if settings.model.double_quantization else 0.5 + 4 / 64


def _offloaded(zero: dict, name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"
