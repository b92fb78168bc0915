"""Give a model Lag-Relative Sparse Attention, and take it away again."""

from __future__ import annotations

import logging
import types

from transformers import PreTrainedModel

from lrsa.attention import check_impl
from lrsa.config import LRSAConfig
from lrsa.hf import mask  # noqa: F401  registers the mask function
from lrsa.hf.attention import NAME
from lrsa.hf.generation import generate
from lrsa.hf.layers import attends, sliding_windows
from lrsa.hf.support import attention_modules, check_model, text_config

logger = logging.getLogger(__name__)


def apply_lrsa(model: PreTrainedModel, config: LRSAConfig, impl: str = "auto") -> PreTrainedModel:
    """Give a model Lag-Relative Sparse Attention, for training, evaluation and generation with `LRSACache`.

    Layers with a sliding window keep it, and only the others are compressed. A window of at least
    `max_position_embeddings` holds everything that the model can read, and counts as none. Of a model that also takes
    images or sound, only the language model is changed.

    Args:
        model: a transformers causal LM, or a PEFT model around one; changed in place.
        config: the settings; they travel as `model.config.lrsa`. Applying again changes them.
        impl: what computes the attention, as `lrsa_attention` takes it; it is not stored with the model.

    Returns:
        The same model.

    Raises:
        ValueError: when the model cannot run LRSA (its class fixes its attention, it has layers of another kind, it is
            not causal, ...), `skip_layers` names a layer it does not have, or there is no such `impl`. The model is
            then as it was.
    """
    check_impl(impl)
    base = _transformers_model(model)
    check_model(base, config)
    text = text_config(base)
    if text._attn_implementation != NAME:
        base._attention_before_lrsa = text._attn_implementation
    _set_attention(base, NAME)
    set_config(base, config)
    for module in attention_modules(base):
        module.lrsa_impl = impl
    base.generate = types.MethodType(generate, base)
    generation = getattr(base, "generation_config", None)
    if generation is not None and generation.use_cache is False:  # stored with some models; a cache would be ignored
        generation.use_cache = base._generation_without_cache = True
    if not compressed_layers(base, config.replace(skip_layers=())):
        logger.warning(
            "lrsa will compress nothing: every layer of %s slides over its last %d tokens. Load the model with "
            "sliding_window=None to let it attend to everything, which LRSA then compresses.",
            type(base).__name__,
            max(filter(None, sliding_windows(text))),
        )
    return model


def set_config(model: PreTrainedModel, config: LRSAConfig) -> None:
    """Change the settings of a model that `apply_lrsa` has prepared, as training does from step to step."""
    base = _transformers_model(model)
    base.config.lrsa = text_config(base).lrsa = config


def remove_lrsa(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model back the attention that it had before `apply_lrsa` ("sdpa" if it was loaded with "lrsa")."""
    base = _transformers_model(model)
    if text_config(base)._attn_implementation == NAME:
        _set_attention(base, base.__dict__.pop("_attention_before_lrsa", "sdpa"))
    for config in (base.config, text_config(base)):
        if hasattr(config, NAME):
            del config.lrsa
    base.__dict__.pop("generate", None)
    for module in base.modules():
        module.__dict__.pop("lrsa_impl", None)
    if base.__dict__.pop("_generation_without_cache", False):
        base.generation_config.use_cache = False
    return model


def compressed_layers(model: PreTrainedModel, config: LRSAConfig) -> list[int]:
    """Indices of the layers whose attention LRSA replaces: those that do not slide and are not in `skip_layers`."""
    text = text_config(_transformers_model(model))
    full = [layer for layer, window in enumerate(sliding_windows(text)) if window is None and attends(text, layer)]
    return [layer for layer in full if layer not in config.skip_layers]


def is_applied(model: PreTrainedModel) -> bool:
    """Whether a model's language model runs the attention "lrsa"."""
    return text_config(_transformers_model(model))._attn_implementation == NAME


def _set_attention(base: PreTrainedModel, name: str) -> None:
    """Set the attention of the language model alone; its other parts, which may have been loaded so, get "sdpa"."""
    text = text_config(base)
    for module in base.modules():
        config = getattr(module, "config", None)
        if config is not text and getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation_internal = "sdpa"
    text._attn_implementation_internal = name  # what set_attn_implementation sets, which would set every part


def _transformers_model(model) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
