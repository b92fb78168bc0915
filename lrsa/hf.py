"""Plugs the attention and its cache into transformers, and pulls them out again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import fields

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lrsa.attention import check_impl, lrsa_attention
from lrsa.attention.sliding import sliding_attention
from lrsa.config import LRSAConfig

NAME = "lrsa"
logger = logging.getLogger(__name__)

# What a model may ask of its attention that this one does not do: named and refused, never ignored.
REFUSED = {
    "softcap": "caps its attention scores, which flash kernels cannot: load it with attn_logit_softcapping=None to do "
    "without",
    "s_aux": "has attention sinks as parameters, a share of every softmax that belongs to no token and that "
    "lrsa's attention does not carry",
    "sinks": "has attention sinks as parameters, a share of every softmax that belongs to no token and that "
    "lrsa's attention does not carry",
    "position_bias": "adds a bias to its attention scores, which flash kernels cannot",
    "indices": "chooses the tokens that it attends to itself",
    "block_indices": "chooses the tokens that it attends to itself",
    "head_mask": "masks heads",
}


def apply_lrsa(model: PreTrainedModel, config: LRSAConfig, impl: str = "auto") -> PreTrainedModel:
    """Give a model Lag-Relative Sparse Attention, for training, evaluation and generation with `LRSACache`.

    Layers with a sliding window keep it, and only the others are compressed. A window of at least
    `max_position_embeddings` holds everything that the model can read, and counts as none.

    Args:
        model: a transformers causal LM, or a PEFT model around one; changed in place.
        config: the settings; they travel as `model.config.lrsa`. Applying again changes them.
        impl: what computes the attention, as `lrsa_attention` takes it; it is not stored with the model.

    Returns:
        The same model.

    Raises:
        ValueError: when the model's class fixes its attention, some of its layers are of another kind (recurrent,
            convolution, chunked, ...), `skip_layers` names a layer it does not have, or there is no such `impl`.
    """
    check_impl(impl)
    base = _transformers_model(model)
    text = base.config.get_text_config()
    layers = text.num_hidden_layers
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(
            f"lrsa does not support {type(base).__name__}: it has layers of {', '.join(other)}, which neither its "
            "attention nor its cache can hold. Full attention and sliding windows are supported."
        )
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
    set_config(base, config)
    for module in base.modules():
        if hasattr(module, "layer_idx"):
            module.lrsa_impl = impl
    if layers and not compressed_layers(base, config.replace(skip_layers=())):
        logger.warning(
            "lrsa will compress nothing: every layer of %s slides over its last %d tokens. Load the model with "
            "sliding_window=None to let it attend to everything, which LRSA then compresses.",
            type(base).__name__,
            text.sliding_window,
        )
    return model


def set_config(model: PreTrainedModel, config: LRSAConfig) -> None:
    """Change the settings of a model that `apply_lrsa` has prepared, as training does from step to step."""
    for module_config in _configs(_transformers_model(model)):
        module_config.lrsa = config


def compressed_layers(model: PreTrainedModel, config: LRSAConfig) -> list[int]:
    """Indices of the layers whose attention LRSA replaces: those that do not slide and are not in `skip_layers`."""
    windows = sliding_windows(_transformers_model(model).config)
    return [layer for layer, window in enumerate(windows) if layer not in config.skip_layers and window is None]


def sliding_windows(config) -> list[int | None]:
    """The sliding window of every layer of a model's configuration in tokens, None where there is none."""
    text = config.get_text_config()
    return [_if_within(_sliding(text, layer), text) for layer in range(text.num_hidden_layers)]


def remove_lrsa(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model back the attention that it had before `apply_lrsa` ("sdpa" if it was loaded with "lrsa")."""
    base = _transformers_model(model)
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(base.__dict__.pop("_attention_before_lrsa", "sdpa"))
    for module_config in _configs(base):
        if hasattr(module_config, NAME):
            del module_config.lrsa
    for module in base.modules():
        module.__dict__.pop("lrsa_impl", None)
    return model


def config_of(model) -> LRSAConfig:
    """The settings of a model or one of its modules: `model.config.lrsa`, or the defaults when it was not set."""
    config = getattr(model.config, NAME, None)
    if isinstance(config, LRSAConfig):
        return config
    return LRSAConfig() if config is None else LRSAConfig.from_dict(config)


def _transformers_model(model) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _configs(model: PreTrainedModel) -> list:
    """Every configuration object in the model; a model for text and images has several."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    text = model.config.get_text_config()
    return list((configs | {id(text): text}).values())


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
    cache = getattr(key, "lrsa_cache", None)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    window, impl = _window(module, kwargs), getattr(module, "lrsa_impl", "auto")
    options = {"scale": scaling, "position_ids": position_ids, "attention_mask": attention_mask}
    if cache is not None:
        _compare(cache.config, config_of(module))
        out = cache.attend(module.layer_idx, window, query, key, value, impl=impl, **options)
    elif query.shape[2] != key.shape[2]:
        raise ValueError(
            'attention "lrsa" generates over its own cache: call model.generate(..., '
            "past_key_values=lrsa.LRSACache(config)), or lrsa.remove_lrsa(model) to use another cache."
        )
    elif window:
        out = sliding_attention(query, key, value, window, **options)
    else:
        config, supervision = _layer_config(module), kwargs.get("lrsa_supervision")
        if supervision is not None and supervision.recording:  # the teacher has the full cache
            config = _full(config)
        out = lrsa_attention(query, key, value, config, impl=impl, **options)
        if supervision is not None:
            out = supervision.attach(module.layer_idx, query, key, value, out, scaling, position_ids, attention_mask)
    return out.transpose(1, 2), None


def lrsa_mask(
    *args,
    q_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable | None = None,
    use_vmap: bool = False,
    **kwargs,
):
    """The mask function that transformers calls once per forward: the new tokens' padding mask, `None` if all real.

    Causality and sliding windows are the attention's own affair; any other pattern is refused.
    """
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise ValueError("the model adds its own pattern to the causal mask, which lrsa does not support.")
    if attention_mask is None:
        return None
    q_length = args[1] if q_length is None else q_length
    padding = attention_mask[:, -q_length:]
    return None if padding.all() else padding


def _window(module, options: dict) -> int | None:
    """The sliding window of a layer in tokens; some models give it to their mask only, so their config is read."""
    window = options["sliding_window"] if "sliding_window" in options else _sliding(module.config, module.layer_idx)
    return _if_within(window, module.config)


def _sliding(config, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def _if_within(window: int | None, config) -> int | None:
    longest = getattr(config, "max_position_embeddings", None)
    return None if not window or (longest and window >= longest) else window


def _layer_config(module) -> LRSAConfig:
    return _of_layer(config_of(module), module.layer_idx)


_of_layer = functools.lru_cache(maxsize=1024)(LRSAConfig.for_layer)
_full = functools.lru_cache(maxsize=64)(LRSAConfig.full)


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
            f"attention dropout must be 0 under lrsa, got {dropout}: set model.config.attention_dropout=0."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"lrsa takes the 2D padding mask [batch, tokens], got {attention_mask.dim()} dimensions: "
            "pass attention_mask as the tokenizer returns it."
        )
    if not (options.get("is_causal") is not False and getattr(module, "is_causal", True)):
        raise ValueError(f"{type(module).__name__} is not causal; lrsa is for causal language models.")


AttentionInterface.register(NAME, lrsa_attention_forward)
AttentionMaskInterface.register(NAME, lrsa_mask)
