"""What a cache costs: tokens and bytes per layer, read off the tensors that it really holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache

from lrsa.cache import CACHE_ARGUMENT, LRSACache
from lrsa.config import LRSAConfig
from lrsa.evaluation.measure.state import active_config, causal_lm, in_eval_mode
from lrsa.hf import compressed_layers
from lrsa.hf.layers import attends


@dataclass(frozen=True)
class LayerCost:
    """The cache of one layer.

    Attributes:
        layer: index of the layer.
        seen: tokens of the longest row so far.
        kept: tokens of that row that each KV head still holds.
        bytes: memory of everything the layer holds, for the whole batch, spare room included.
        full_bytes: memory of the keys and values of all tokens seen, which is what a full cache takes.
    """

    layer: int
    seen: int
    kept: int
    bytes: int
    full_bytes: int


def cache_cost(cache: Cache) -> list[LayerCost]:
    """Tokens and bytes of every layer with keys of its own in a cache that has been used, `LRSACache` or any other.

    Recurrent layers hold no tokens, and layers that share keys none of their own: neither is listed.

    Raises:
        ValueError: when the cache is empty.
    """
    layers = [(i, layer) for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    if not layers:
        raise ValueError("the cache is empty: run the model over it first.")
    return [_layer_cost(index, layer) for index, layer in layers]


def prefill_cost(model, input_ids: Sequence[int]) -> list[LayerCost]:
    """Cost of the cache after the model has read one row, under the attention that it has now."""
    lm, config = causal_lm(model), active_config(model)
    cache = DynamicCache(config=lm.config) if config is None else LRSACache(config)
    with in_eval_mode(model):
        ids = torch.tensor([list(input_ids)], device=lm.device)
        lm.base_model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache_cost(cache)


def kept_share(model, config: LRSAConfig | None, lengths: Sequence[int]) -> float:
    """Share of the tokens of rows of these lengths that a cache holds when they have been read, over heads and layers.

    It follows from the lengths alone. Layers that slide count as whole, and recurrent ones, which hold none, not.
    """
    if config is None:
        return 1.0
    text = causal_lm(model).config.get_text_config()
    attending = sum(attends(text, layer) for layer in range(text.num_hidden_layers))
    compressed = len(compressed_layers(model, config)) / attending
    return 1 - compressed + compressed * sum(map(config.kept_length, lengths)) / sum(lengths)


def _layer_cost(index: int, layer) -> LayerCost:
    held = getattr(layer, "held", None)
    seen = layer.get_seq_length() if held is None else max(layer.seen)
    kept = layer.keys.shape[-2] if held is None else max(held())
    # A view keeps the whole storage behind it alive, so storages are counted, not elements.
    storages = (tensor.untyped_storage() for tensor in _tensors(vars(layer)))
    size = {storage.data_ptr(): storage.nbytes() for storage in storages}
    per_token = sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))
    return LayerCost(index, seen, kept, sum(size.values()), seen * per_token)


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
