"""Decoding over the compressed KV cache that this repository's adapter was trained for.

    model.generate(**inputs, custom_generate="user/name", trust_remote_code=True, max_new_tokens=100)

transformers runs this file in place of `generate`. The settings in `settings.py` are those of `lrsa_config.json`,
written when the adapter was published. Needs `pip install lrsa`.
"""

from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa

from .settings import SETTINGS


def generate(model, past_key_values=None, **arguments):
    """`generate` over an `LRSACache`; a model that was not under LRSA has its own attention back when this returns.

    Args:
        model: the causal LM that `generate` was called on.
        past_key_values: an `LRSACache` to continue; a new one when not given.
        arguments: those of `generate`, whose result is returned.

    Raises:
        ValueError: for a cache of another kind, which would not be compressed.
    """
    config = LRSAConfig.from_dict(SETTINGS)
    cache = LRSACache(config) if past_key_values is None else past_key_values
    if not isinstance(cache, LRSACache):
        raise ValueError(f"past_key_values must be an lrsa.LRSACache, got {type(cache).__name__}: leave it out.")
    if model.config._attn_implementation == "lrsa":
        return _generate(model, past_key_values=cache, **arguments)
    apply_lrsa(model, config)
    try:
        return _generate(model, past_key_values=cache, **arguments)
    finally:
        remove_lrsa(model)


def _generate(model, **arguments):
    """The class's own: a model that was loaded with this file as its `generate` would call itself for ever."""
    return type(model).generate(model, **arguments)
