"""Which implementation computes a model's attention: chosen where a user stands, and named truly."""

import pytest
import torch

from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.attention import api
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation.measure.state import with_attention

CONFIG = LRSAConfig(2, 8, 2)


@pytest.fixture
def calls(monkeypatch):
    made = []
    for name, attend in api.IMPLEMENTATIONS.items():
        spy = lambda *args, name=name, attend=attend: made.append(name) or attend(*args)  # noqa: E731
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, spy)
    return made


@pytest.mark.parametrize("impl", ["reference", "native", "tiled"])
def test_the_chosen_implementation_runs_in_forward_and_prefill(random_llama, calls, impl):
    ids = torch.randint(0, 48, (1, 60))
    apply_lrsa(random_llama, CONFIG, impl=impl)
    logits = random_llama(ids, use_cache=False).logits
    assert set(calls) == {impl} and len(calls) == 3
    cache = LRSACache(CONFIG)
    chunks = [random_llama(part, **{CACHE_ARGUMENT: cache}).logits for part in ids.split(30, dim=1)]
    assert set(calls) == {impl} and len(calls) == 9
    torch.testing.assert_close(torch.cat(chunks, dim=1), logits, atol=1e-10, rtol=0)
    remove_lrsa(random_llama)
    apply_lrsa(random_llama, CONFIG)
    random_llama(ids, use_cache=False)
    assert calls[-1] == "native", "the choice is gone with the attention that it was made for"


def test_an_evaluation_keeps_the_chosen_implementation(random_llama, calls):
    ids = torch.randint(0, 48, (1, 60))
    apply_lrsa(random_llama, CONFIG, impl="reference")
    with with_attention(random_llama, CONFIG.replace(top_k=4)):
        random_llama(ids, use_cache=False)
    random_llama(ids, use_cache=False)
    assert set(calls) == {"reference"} and len(calls) == 6


def test_no_such_implementation(random_llama):
    before = random_llama.config._attn_implementation
    with pytest.raises(ValueError, match=r"impl must be 'auto' or one of 'reference'.*got 'fast'"):
        apply_lrsa(random_llama, CONFIG, impl="fast")
    assert random_llama.config._attn_implementation == before and not hasattr(random_llama.config, "lrsa")


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "head_dim", "text"),
    [
        ("auto", "cpu", torch.float32, 64, "native (compiled"),
        ("auto", "cuda", torch.bfloat16, 64, "tiled (PyTorch's flash kernels)"),
        ("auto", "cuda", torch.float32, 64, "tiled (matrix products"),
        ("tiled", "cuda", torch.float16, 65, "tiled (matrix products"),
        ("cudnn", "cuda", torch.bfloat16, 64, "cudnn (cuDNN"),
        ("flex", "cuda", torch.bfloat16, 64, "flex (FlexAttention)"),
    ],
)
def test_what_really_runs_is_named(impl, device, dtype, head_dim, text):
    assert api.describe(impl, device, dtype, head_dim).startswith(text)


def test_soft_caps_go_where_they_can_be_computed():
    found = [api.choose(device, torch.bfloat16, 64, part) for device in ("cuda", "cpu") for part in ("whole", "part")]
    assert found == ["flex", "reference", "native", "native"]


def test_a_layer_that_attends_twice_or_under_another_index_is_refused(random_llama):
    apply_lrsa(random_llama, CONFIG)
    attention = random_llama.model.layers[1].self_attn
    states = torch.randn(1, 20, 32, dtype=torch.float64)
    positions = random_llama.model.rotary_emb(states, torch.arange(20)[None])
    cache = LRSACache(CONFIG)
    true_index, attention.layer_idx = attention.layer_idx, 0
    update = cache.update
    cache.update = lambda k, v, layer, **options: update(k, v, 2)
    with pytest.raises(ValueError, match="layer 0 attends to new tokens, but those of layer 2 were announced"):
        attention(states, positions, None, **{CACHE_ARGUMENT: cache})
    attention.layer_idx, cache = true_index, LRSACache(CONFIG)
    key = torch.randn(1, 2, 20, 8, dtype=torch.float64)
    query = torch.randn(1, 4, 20, 8, dtype=torch.float64)
    cache.update(key, key, 1)
    cache.attend(1, None, query, key, key)
    with pytest.raises(ValueError, match="layer 1 attends to new tokens, but none were announced"):
        cache.attend(1, None, query, key, key)
