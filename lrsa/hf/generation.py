"""What `generate` of a model under LRSA refuses: calls over an `LRSACache` that would answer something else in silence.

transformers takes the prompt for all tokens since the cache was empty, cuts off as many as the cache has seen, and
never looks at what they were.
"""

from __future__ import annotations

import functools

import torch
from transformers import GenerationMixin

from lrsa.cache import CACHE_ARGUMENT, LRSACache

# Options of `generate` that run the model beside its cache, and what they do.
_IMPOSSIBLE = {
    "guidance_scale": "runs the model a second time over a cache of its own",
    "penalty_alpha": "looks ahead over copies of the cache",
    "use_cache": "feeds all tokens again at every step",
}


@functools.wraps(GenerationMixin.generate)
def generate(model, inputs=None, generation_config=None, *args, **options):
    """`generate` of transformers over a cache that has seen the beginning of these tokens, or nothing.

    Raises:
        ValueError: when the prompt does not continue what the cache has seen, or an option cannot work over it.
    """
    if "past_key_values" in options:  # the name until transformers 5.24, with which it would warn
        options[CACHE_ARGUMENT] = options.pop("past_key_values")
    cache = options.get(CACHE_ARGUMENT)
    own = functools.partial(type(model).generate, model, inputs)
    if args:
        own = functools.partial(own, generation_config, *args)
    elif generation_config is not None:  # by name: not every model has a place for it
        options["generation_config"] = generation_config
    if not isinstance(cache, LRSACache):
        return own(**options)
    option = functools.partial(_option, model.generation_config, generation_config, options)
    for name, meaning in _IMPOSSIBLE.items():
        value = option(name)
        if value is False if name == "use_cache" else value not in (None, 1, 0.0):
            raise ValueError(f"{name}={value} {meaning}, which an LRSACache cannot follow: leave {name} out.")
    ids = inputs if inputs is not None else options.get("input_ids")
    embeds, mask = options.get("inputs_embeds"), options.get("attention_mask")
    if embeds is not None:
        _refuse_other(cache, embeds.shape[1], None, None)
    else:
        _refuse_other(cache, 0 if ids is None else ids.shape[1], ids, mask)
    before, cache.ids = cache.ids, None  # what is not known to be right after an error is forgotten
    found = own(**options)
    cache.is_reordered |= (option("num_beams") or 1) > 1
    sequences = getattr(found, "sequences", found)
    if mask is not None and ids is not None and mask.shape[1] > ids.shape[1]:  # the new turn alone was given
        sequences = None if before is None else torch.cat([before, sequences], 1)
    if sequences is not None and embeds is None:
        cache.ids = sequences[:, : cache.get_seq_length()]
    return found


def _option(stored, given, options: dict, name: str):
    """The value of a generation option that counts: that of the call, of its generation_config, of the model."""
    for source in (options.get(name), getattr(given, name, None), getattr(stored, name, None)):
        if source is not None:
            return source
    return None


def _refuse_other(cache: LRSACache, length: int, ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Check that a prompt of `length` tokens goes on where the cache is."""
    seen = cache.get_seq_length()
    if not seen:
        return
    if cache.is_reordered:
        raise ValueError("beam search has reordered the rows of this LRSACache: use a new one for the next prompt.")
    total = length if mask is None else mask.shape[1]
    alone = mask is not None and total > length  # only new tokens, and a mask over all
    known = cache.ids if cache.ids is not None and cache.ids.shape[1] == seen else None
    if alone and total == seen + length:
        return
    begins = not alone and length > seen
    if begins and ids is not None and known is not None and len(known) == len(ids):
        begins = torch.equal(known.to(ids.device), ids[:, :seen])
    if not begins:
        raise ValueError(
            f"this LRSACache has seen {seen} tokens, and the {length} tokens given"
            f"{f' with an attention_mask of {total}' if alone else ''} do not go on from there: pass the whole "
            "conversation, which begins with the very tokens it has seen, or only the tokens after them with an "
            f"attention_mask over all ({seen} + the new ones); for another prompt use a new LRSACache."
        )
