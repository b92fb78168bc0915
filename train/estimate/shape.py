"""The numbers of a model and its adapter that decide memory and time, read off the modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lrsa.hf import sliding_windows
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings

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
        windows: sliding window of every layer in tokens, None where there is none.
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
    windows: tuple[int | None, ...]

    def width_in(self, projection: str) -> int:
        """Input channels of a projection."""
        return {"o_proj": self.heads * self.head_dim, "down_proj": self.mlp}.get(projection, self.hidden)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's frozen projections."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.hidden * (attention + 3 * self.mlp)


def shape_of(model: nn.Module, rank: int) -> ModelShape:
    """The shape of a PEFT model, on any device, `meta` included.

    Raises:
        ValueError: when its layers are not those of a decoder with gated MLPs.
    """
    config = model.config.get_text_config()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in ATTENTION + MLP if name not in names]
    if missing:
        raise ValueError(
            f"{config.model_type} has no {', '.join(missing)}: memory and time are known for decoders with q, k, v, o, "
            "gate, up and down projections (Llama, Qwen2, Qwen3, Mistral, ...)."
        )
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
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
        windows=tuple(sliding_windows(config)),
    )


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

    from train.model import lora_config

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.model.trust_remote_code)
            model = get_peft_model(model, lora_config(settings.lora))
        return shape_of(model, settings.lora.r)
    except ValueError as error:
        raise SettingsError([Problem("", f"model.name_or_path {settings.model.name_or_path}", str(error))]) from error
