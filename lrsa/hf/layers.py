"""What a model's configuration says about its layers: their settings, their kinds, their sliding windows."""

from __future__ import annotations

import sys

from lrsa.attention.sliding import Chunk
from lrsa.config import LRSAConfig

NAME = "lrsa"
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds in `config.layer_types` that attend


def config_of(model) -> LRSAConfig:
    """The settings of a model or one of its modules: `model.config.lrsa`, or the defaults when it was not set."""
    found = getattr(model.config, NAME, None)
    if isinstance(found, LRSAConfig):
        return found
    return LRSAConfig() if found is None else LRSAConfig.from_dict(found)


def sliding_windows(config) -> list[int | None]:
    """The sliding window of every layer of a model's configuration in tokens, None where there is none."""
    text = config.get_text_config()
    return [within(sliding(text, layer), text) for layer in range(text.num_hidden_layers)]


def is_recurrent(config) -> bool:
    """Whether some layers of a text configuration hold a state instead of keys, which no packing can tell apart."""
    return bool({"linear_attention", "conv"} & set(getattr(config, "layer_types", None) or ()))


def attends(config, layer: int) -> bool:
    """Whether a layer of a text configuration attends to tokens at all."""
    kinds = getattr(config, "layer_types", None)
    return kinds is None or kinds[layer] in ATTENTION


def first_attention(config) -> int:
    """Index of the first layer of a text configuration that attends to tokens."""
    return next((layer for layer in range(config.num_hidden_layers) if attends(config, layer)), 0)


def sliding(config, layer: int) -> int | None:
    """The sliding window or `Chunk` that a text configuration gives a layer, unless its model makes no such mask."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] == "chunked_attention":
        return Chunk(config.attention_chunk_size)
    modelling = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    if modelling is not None and not hasattr(modelling, "create_sliding_window_causal_mask"):
        return None
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def within(window: int | None, config) -> int | None:
    """A window in tokens; None when it holds everything that the model can read."""
    longest = getattr(config, "max_position_embeddings", None)
    return None if not window or (longest and window >= longest) else window


def window_of(module, options: dict) -> int | None:
    """The sliding window of an attention module in tokens, None if it sees everything.

    Args:
        options: what the module handed to its attention; models that hand the window to their mask only are asked by
            their configuration.
    """
    if "sliding_window" in options:
        return within(options["sliding_window"], module.config)
    return within(sliding(module.config, module.layer_idx), module.config)


def rotary_switch(config) -> int | None:
    """Tokens of a row up to which a model keeps one rotary table; None if it has one for all lengths.

    Behind it longrope and dynamic NTK rotate all tokens of a row otherwise, so that what a cache holds no longer fits.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    switching = [kind for kind in kinds if kind.get("rope_type") in ("longrope", "dynamic")]
    lengths = [kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in switching]
    return min(lengths, default=None)
