"""The attention that transformers calls in every layer of a model under LRSA, by the name "lrsa"."""

from __future__ import annotations

import functools
import logging
from dataclasses import fields

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrsa.attention import lrsa_attention
from lrsa.attention.documents import find_documents
from lrsa.attention.sliding import Chunk, sliding_attention
from lrsa.config import LRSAConfig
from lrsa.hf.latent import expansion
from lrsa.hf.layers import NAME, config_of, first_attention, is_recurrent, rotary_switch, window_of
from lrsa.hf.support import REFUSED, check_named

logger = logging.getLogger(__name__)


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in every layer: `[B, H, T, D]` in, `[B, T, H, D]` out."""
    if not hasattr(module, "lrsa_impl"):  # loaded by the name of this attention, without apply_lrsa
        check_named(module.config, module)
        module.lrsa_impl = "auto"
    cache = getattr(key, "lrsa_cache", None)
    across = cache is None and attention_mask is None and query.shape[2] != key.shape[2]  # two inputs
    if across and getattr(module, "is_causal", True) is False:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=False)
    _refuse(module, attention_mask, dropout, kwargs)
    tokens, shares = query.shape[2], getattr(module, "is_kv_shared_layer", False)
    follow = position_ids if position_ids is not None and position_ids.dim() == 2 else None
    attention_mask, position_ids = _documents(attention_mask, position_ids)
    if is_recurrent(module.config):
        _refuse_packing(module, query, attention_mask, position_ids)
    layer, attention_mask, position_ids = _owner(module, key, attention_mask, position_ids)
    if shares and tokens < key.shape[2]:  # the model has left out queries whose logits nobody wants
        query = F.pad(query, (0, 0, key.shape[2] - tokens, 0))
    if module.layer_idx == first_attention(module.config):
        held = cache is not None and any(hasattr(layer, "seen") for layer in cache.layers)  # not recurrent states alone
        before = cache.get_seq_length() if held else 0
        _refuse_other_rotation(module, before + query.shape[2], position_ids if cache is None else None)
        _refuse_counted_padding(module, before, attention_mask, position_ids)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    window, impl = window_of(module, kwargs), module.lrsa_impl
    options = {"scale": scaling, "position_ids": position_ids, "attention_mask": attention_mask}
    options |= {"softcap": softcap, "sinks": s_aux}
    if (expand := expansion(module)) is not None:
        options["expand"] = expand
    if cache is not None:
        out = _over_cache(cache, module, layer, window, (query, key, value), options | {"impl": impl, "follow": follow})
    elif query.shape[2] != key.shape[2]:
        raise ValueError(
            'attention "lrsa" generates over its own cache: call model.generate(..., '
            "past_key_values=lrsa.LRSACache(config)), or lrsa.remove_lrsa(model) to use another cache."
        )
    elif window:
        out = sliding_attention(query, key, value, window, **options)
    else:
        out = lrsa_attention(query, key, value, _of_layer(config_of(module), layer), impl=impl, **options)
        if supervision := kwargs.get("lrsa_supervision"):
            out = supervision.attach(module.layer_idx, query, key, value, out, **options)
    # Contiguous, as every attention of transformers returns it: models may call view on it.
    return out[:, :, -tokens:].transpose(1, 2).contiguous(), None


def _over_cache(cache, module, layer: int, window: int | None, states: tuple, options: dict) -> torch.Tensor:
    """Attention of new tokens over what a cache holds, which then takes them in."""
    _compare(cache.config, config_of(module))
    attend = cache.attend_again if getattr(module, "is_kv_shared_layer", False) else cache.attend
    options["shared"] = getattr(module, "store_full_length_kv", False)
    if module.layer_idx != first_attention(module.config):
        options["follow"] = None
    if isinstance(window, Chunk):  # its mask restarts positions where chunks begin
        options["position_ids"] = None
    return attend(layer, window, *states, **options)


def _documents(attention_mask, position_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The padding mask and the positions that tell documents apart, wherever the model has handed them over.

    Models that give their positions to the mask alone have them in an int32 mask (`lrsa.hf.mask`). Positions in three
    dimensions (time, height, width) count one document from where all three are 0.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[:, 0, :, 0]
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return None, attention_mask
    if position_ids is not None and position_ids.dim() == 3:
        place = torch.arange(position_ids.shape[2], device=position_ids.device)
        begins = (position_ids == 0).all(0)
        position_ids = place - torch.where(begins, place, 0).cummax(1).values
    return attention_mask, position_ids


_of_layer = functools.lru_cache(maxsize=1024)(LRSAConfig.for_layer)


@functools.lru_cache(maxsize=64)
def _compare(cache: LRSAConfig, model: LRSAConfig) -> None:
    """Warn once when the cache keeps other tokens than the model was set to."""
    names = [field.name for field in fields(LRSAConfig)]
    pairs = [(name, getattr(cache, name), getattr(model, name)) for name in names]
    pairs.append(("selection by", type(cache).__name__, type(model).__name__))
    differ = [f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]
    if differ:
        logger.warning("this LRSACache differs from the model's LRSA settings (%s)", ", ".join(differ))


def _refuse(module, attention_mask, dropout, options) -> None:
    for name, meaning in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"lrsa does not support this model: {type(module).__name__} {meaning} ({name}). "
                "lrsa.remove_lrsa(model) gives it back its own attention."
            )
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 under lrsa, got {dropout}: load the model with {_dropout_name(module)}=0 "
            "(from_pretrained takes it); its layers have copied what was in its configuration."
        )
    if attention_mask is not None and attention_mask.dim() != 2 and attention_mask.shape[1:4:2] != (1, 1):
        raise ValueError(
            f"lrsa takes the 2D padding mask [batch, tokens], got {attention_mask.dim()} dimensions: "
            "pass attention_mask as the tokenizer returns it. A model that makes its own mask, without "
            "AttentionMaskInterface, is not supported."
        )
    if not (options.get("is_causal") is not False and getattr(module, "is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} is not causal; lrsa is for causal language models. "
            "lrsa.apply_lrsa(model, config) sets the language model alone."
        )


def _owner(module, key, attention_mask, position_ids) -> tuple:
    """The layer whose keys these are, their padding mask and their positions: other layers may attend to them again."""
    if getattr(module, "store_full_length_kv", False):
        key.lrsa_owner = module.layer_idx, attention_mask, position_ids
        key.lrsa_cut = not torch.is_grad_enabled()
    if not getattr(module, "is_kv_shared_layer", False):
        return module.layer_idx, attention_mask, position_ids
    if not hasattr(key, "lrsa_owner"):
        raise ValueError(
            f"lrsa does not support layers of {type(module).__name__} that share keys across devices: keep the layers "
            "of the model on one."
        )
    if key.lrsa_cut and torch.is_grad_enabled():
        raise ValueError(
            f"layers of {type(module).__name__} share keys, whose gradients gradient checkpointing with "
            "use_reentrant=True loses, in transformers itself too: train with gradient_checkpointing: false, or, but "
            "under ZeRO-3, which needs it so, with gradient_checkpointing_kwargs: {use_reentrant: false}."
        )
    return key.lrsa_owner


def _refuse_packing(module, query, attention_mask, position_ids) -> None:
    rows = query.shape[0]
    if query.shape[2] > 1:
        documents = find_documents(attention_mask, position_ids, (rows, query.shape[2]))
        if sum(group.shape[0] for group in documents) > rows:
            raise ValueError(
                f"packed rows cannot be told apart by the recurrent layers of this model ({module.config.model_type}): "
                "give each document a row of its own (packing: false)."
            )


def _refuse_counted_padding(module, before: int, attention_mask, position_ids) -> None:
    """Padding in front of a row that counts as positions turns all keys of the row, and others would be selected."""
    if attention_mask is None or position_ids is None or attention_mask.shape[1] != position_ids.shape[1]:
        return
    real = attention_mask.bool()
    first = real.int().argmax(1, keepdim=True)
    counted = position_ids.expand(real.shape).gather(1, first) == before + first
    if (counted & (first > 0) & real.any(1, keepdim=True)).any():
        raise ValueError(
            "lrsa needs positions that count from a row's first real token, and in this batch the padding on the left "
            f"counts ({module.config.model_type}): pass position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0), "
            "as generate does of most models; where generate leaves them out, generate for each row by itself."
        )


def _refuse_other_rotation(module, longest: int, position_ids) -> None:
    switch = rotary_switch(module.config)
    if switch is None:
        return
    if position_ids is not None:
        longest = int(position_ids.max()) + 1
    if longest > switch:
        raise ValueError(
            f"lrsa runs this model on rows of up to {switch} tokens, got {longest}: behind {switch} its rotary "
            f"embedding ({type(module.config).__name__}.rope_parameters) rotates all tokens otherwise, and the keys "
            f"in a cache would no longer fit. Keep rows within {switch} tokens, prompt and answer together."
        )


def _dropout_name(module) -> str:
    names = [name for name in vars(module.config) if "drop" in name and "att" in name and getattr(module.config, name)]
    return names[0] if names else "attention_dropout"


AttentionInterface.register(NAME, lrsa_attention_forward)
