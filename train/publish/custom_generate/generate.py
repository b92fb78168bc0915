"""Decoding over the compressed KV cache that this repository's adapter was trained for.

    model.generate(**inputs, custom_generate="user/name", trust_remote_code=True, max_new_tokens=100)

transformers runs this file in place of `generate`. The settings in `settings.py` are those of `lrsa_config.json`,
written when the adapter was published. Needs `pip install lrsa`.
"""

from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT

from .settings import END, SETTINGS


def generate(model, cache=None, past_key_values=None, **arguments):
    """`generate` over an `LRSACache`; a model that was not under LRSA has its own attention back when this returns.

    Args:
        model: the causal LM that `generate` was called on.
        cache: an `LRSACache` to continue; a new one when not given.
        past_key_values: the same, by the name that it had before transformers 5.24.
        arguments: those of `generate`, whose result is returned.

    Raises:
        ValueError: for a cache of another kind, which would not be compressed.
    """
    config = LRSAConfig.from_dict(SETTINGS)
    given = past_key_values if cache is None else cache
    held = LRSACache(config) if given is None else given
    if not isinstance(held, LRSACache):
        raise ValueError(f"{CACHE_ARGUMENT} must be an lrsa.LRSACache, got {type(held).__name__}: leave it out.")
    arguments[CACHE_ARGUMENT] = held
    if END is not None and arguments.get("generation_config") is None and "eos_token_id" not in arguments:
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        arguments["eos_token_id"] = [*known, END]  # where training ended answers
    if model.config._attn_implementation == "lrsa":
        return _generate(model, **arguments)
    apply_lrsa(model, config)
    try:
        return _generate(model, **arguments)
    finally:
        remove_lrsa(model)


def _generate(model, **arguments):
    """The class's own: a model that was loaded with this file as its `generate` would call itself for ever."""
    return type(model).generate(model, **arguments)
