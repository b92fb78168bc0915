"""Plugs the attention and its cache into transformers, and pulls them out again."""

from __future__ import annotations

import functools
import logging

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lrsa.attention import lrsa_attention
from lrsa.config import LRSAConfig

NAME = "lrsa"
logger = logging.getLogger(__name__)

# What a model may ask of its attention that this one does not do: named and refused, never ignored.
REFUSED = {
    "sliding_window": "attends within a sliding window",
    "softcap": "caps its attention scores",
    "s_aux": "has attention sinks as parameters",
    "head_mask": "masks heads",
}


def apply_lrsa(model: PreTrainedModel, config: LRSAConfig) -> PreTrainedModel:
    """Give a model Lag-Relative Sparse Attention, for training, evaluation and generation with `LRSACache`.

    Args:
        model: a transformers causal LM, or a PEFT model around one; changed in place.
        config: the settings; they travel as `model.config.lrsa`. Applying again changes them.

    Returns:
        The same model.

    Raises:
        ValueError: when the model's class fixes its attention, or `skip_layers` names a layer it does not have.
    """
    base = _transformers_model(model)
    layers = base.config.get_text_config().num_hidden_layers
    missing = [layer for layer in config.skip_layers if layer >= layers]
    if missing:
        raise ValueError(f"skip_layers must name layers from 0 to {layers - 1}, got {missing}: the model has {layers}.")
    previous = base.config._attn_implementation
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(base).__name__} does not let its attention be chosen, so lrsa cannot be applied: "
            "use a model of transformers whose attention goes through AttentionInterface."
        )
    if previous != NAME:
        base._attention_before_lrsa = previous
    for module_config in _configs(base):
        module_config.lrsa = config
    return model


def remove_lrsa(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model back the attention that it had before `apply_lrsa` ("sdpa" if it was loaded with "lrsa")."""
    base = _transformers_model(model)
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(base.__dict__.pop("_attention_before_lrsa", "sdpa"))
    for module_config in _configs(base):
        if hasattr(module_config, NAME):
            del module_config.lrsa
    return model


def config_of(model) -> LRSAConfig:
    """The settings of a model or one of its modules: `model.config.lrsa`, or the defaults when it was not set."""
    found = getattr(model.config, NAME, None)
    if isinstance(found, LRSAConfig):
        return found
    return LRSAConfig() if found is None else LRSAConfig.from_dict(found)


def _transformers_model(model) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _configs(model: PreTrainedModel) -> list:
    """Every configuration object in the model; a model for text and images has several."""
    found = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    text = model.config.get_text_config()
    return list((found | {id(text): text}).values())


@torch.compiler.disable  # the rule looks at padding and positions, which a compiler would have to guess
def lrsa_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every layer: `[B, H, T, D]` in, `[B, T, H, D]` out."""
    _refuse(module, attention_mask, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    layer = getattr(key, "lrsa_layer", None)
    if layer is not None:
        _compare(layer.config, _layer_config(module))
        out = layer.attend(query, key, value, attention_mask, position_ids, scaling)
    elif query.shape[2] != key.shape[2]:
        raise ValueError(
            'attention "lrsa" generates over its own cache: call model.generate(..., '
            "past_key_values=lrsa.LRSACache(config)), or lrsa.remove_lrsa(model) to use another cache."
        )
    else:
        out = lrsa_attention(
            query,
            key,
            value,
            _layer_config(module),
            scale=scaling,
            position_ids=position_ids,
            attention_mask=attention_mask,
        )
        supervision = kwargs.get("lrsa_supervision")
        if supervision is not None:
            out = supervision.attach(module.layer_idx, query, key, value, out, scaling, position_ids, attention_mask)
    return out.transpose(1, 2), None


def lrsa_mask(*args, q_length: int | None = None, attention_mask: torch.Tensor | None = None, **kwargs):
    """The mask function that transformers calls once per forward: the new tokens' padding mask, `None` if all real."""
    if attention_mask is None:
        return None
    q_length = args[1] if q_length is None else q_length
    padding = attention_mask[:, -q_length:]
    return None if padding.all() else padding


def _layer_config(module) -> LRSAConfig:
    return _of_layer(config_of(module), module.layer_idx)


_of_layer = functools.lru_cache(maxsize=1024)(LRSAConfig.for_layer)


@functools.lru_cache(maxsize=64)
def _compare(cache: LRSAConfig, model: LRSAConfig) -> None:
    """Warn once when the cache keeps other tokens than the model was set to."""
    differ = [f"{name} {cache[name]} against {model[name]}" for name in model if cache[name] != model[name]]
    if differ:
        logger.warning("this LRSACache differs from the model's LRSA settings (%s)", ", ".join(differ))


def _refuse(module, attention_mask, dropout, options) -> None:
    for name, meaning in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} {meaning} ({name}), which lrsa does not support: "
                f"name layer {module.layer_idx} and its like in another model, or call lrsa.remove_lrsa(model)."
            )
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 under lrsa, got {dropout}: set model.config.attention_dropout=0."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"lrsa takes the 2D padding mask [batch, tokens], got {attention_mask.dim()} dimensions: "
            "pass attention_mask as the tokenizer returns it."
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; lrsa is for causal language models.")


AttentionInterface.register(NAME, lrsa_attention_forward)
AttentionMaskInterface.register(NAME, lrsa_mask)
