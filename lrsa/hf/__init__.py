"""Plugs the attention and its cache into transformers, and pulls them out again."""

from lrsa.hf.apply import apply_lrsa, compressed_layers, is_applied, remove_lrsa, set_config
from lrsa.hf.attention import NAME
from lrsa.hf.latent import has_latents
from lrsa.hf.layers import config_of, sliding_windows

__all__ = [
    "NAME",
    "apply_lrsa",
    "compressed_layers",
    "config_of",
    "has_latents",
    "is_applied",
    "remove_lrsa",
    "set_config",
    "sliding_windows",
]
