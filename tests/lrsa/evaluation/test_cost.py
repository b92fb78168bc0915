"""What a cache costs is read off its tensors."""

import pytest
import torch
from transformers import DynamicCache

from lrsa import LRSACache, LRSAConfig, apply_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation import cache_cost, prefill_cost

CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=2)
SEEN = 2 + 5 * 8 + 3  # five whole windows, four of them compressed, and 3 tokens more
KEPT = 2 + 4 * 2 + 8 + 3
TOKEN = 2 * 2 * 8 * 8  # keys and values of 2 KV heads of 8 channels, 8 bytes each


def test_full_cache_costs_every_token(random_llama):
    costs = prefill_cost(random_llama, range(2, 2 + SEEN))
    assert [cost.layer for cost in costs] == [0, 1, 2]
    assert {(cost.seen, cost.kept, cost.bytes, cost.full_bytes) for cost in costs} == {
        (SEEN, SEEN, SEEN * TOKEN, SEEN * TOKEN)
    }


def test_compressed_cache_costs_what_is_kept(random_llama):
    costs = prefill_cost(apply_lrsa(random_llama, CONFIG.replace(skip_layers=[1])), range(2, 2 + SEEN))
    assert [cost.kept for cost in costs] == [KEPT, SEEN, KEPT]
    assert [cost.bytes for cost in costs] == [
        KEPT * TOKEN + 8,
        SEEN * TOKEN,
        KEPT * TOKEN,
    ]  # 8: the row's next position, in the first layer
    assert {cost.full_bytes for cost in costs} == {SEEN * TOKEN}


def test_room_for_growth_and_the_whole_batch_are_counted(random_llama):
    apply_lrsa(random_llama, CONFIG)
    cache = LRSACache(CONFIG)
    with torch.no_grad():
        for tokens in (SEEN, 1):
            random_llama(torch.ones(3, tokens, dtype=torch.long), **{CACHE_ARGUMENT: cache})
    for cost, layer in zip(cache_cost(cache), cache.layers, strict=True):
        assert (cost.seen, cost.kept) == (SEEN + 1, KEPT + 1)
        positions = 24 if cost.layer == 0 else 0
        assert cost.bytes - positions == 3 * layer.keys.shape[2] * TOKEN > 3 * cost.kept * TOKEN
        assert cost.full_bytes == 3 * cost.seen * TOKEN


def test_a_view_costs_what_it_keeps_alive(random_llama):
    cache = DynamicCache(config=random_llama.config)
    with torch.no_grad():
        random_llama(torch.ones(1, 40, dtype=torch.long), **{CACHE_ARGUMENT: cache})
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
    assert cache_cost(cache)[0].kept == 10
    assert cache_cost(cache)[0].bytes == 40 * TOKEN


def test_empty_cache_is_an_error():
    with pytest.raises(ValueError, match="cache is empty"):
        cache_cost(LRSACache(CONFIG))
