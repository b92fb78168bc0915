"""Whatever is put in comes out right or is refused with a message: never wrong, never a crash without one."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrsa import LRSACache, LRSAConfig, apply_lrsa, lrsa_attention
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.attention.cases import FAST

# Fixtures hold models and directories that examples share and do not change.
common = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def configs(draw) -> LRSAConfig:
    lag = draw(st.integers(1, 9))
    return LRSAConfig(
        draw(st.integers(0, 5)), lag, draw(st.integers(1, lag)), draw(st.sampled_from([0.0, 0.5, 1.0, 9.0]))
    )


@st.composite
def attention_inputs(draw, dtypes=(torch.float64,)) -> tuple:
    """Queries, keys and values as models make them, and degenerate ones: equal tokens, large values, one channel."""
    batch, groups, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 60))
    heads, channels = groups * draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8]))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    size, dtype = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])), draw(st.sampled_from(dtypes))
    query, key, value = (
        torch.randn(batch, count, tokens, channels, dtype=torch.float64) for count in (heads, groups, groups)
    )
    if draw(st.booleans()):  # few distinct tokens: many ties
        key, value = (x[:, :, torch.randint(0, min(3, tokens), (tokens,))] for x in (key, value))
    query, key, value = query.to(dtype), (key * size).to(dtype), value.to(dtype)
    mask = positions = None
    padding = draw(st.sampled_from(["none", "left", "right", "both", "anywhere"]))
    if padding != "none":
        mask = torch.ones(batch, tokens, dtype=torch.long)
        for row in mask:
            first, last = sorted((draw(st.integers(0, tokens)), draw(st.integers(0, tokens))))
            row[: first if padding in ("left", "both") else 0] = 0
            row[last if padding in ("right", "both") else tokens :] = 0
        if padding == "anywhere":
            mask = torch.randint(0, 2, (batch, tokens))
    if draw(st.booleans()):  # packed documents
        starts = torch.rand(batch, tokens) < draw(st.sampled_from([0.02, 0.1, 0.5]))
        positions = torch.stack([_restarting(row.tolist()) for row in starts])
    return query, key, value, mask, positions


def _restarting(starts: list[bool]) -> torch.Tensor:
    position, found = -1, []
    for start in starts:
        position = 0 if start else position + 1
        found.append(position)
    return torch.tensor(found)


def test_attention_equals_its_reference():
    dropped = []

    @settings(max_examples=150, **common)
    @given(attention_inputs(), configs())
    def check(inputs, config):
        query, key, value, mask, positions = inputs
        options = {"position_ids": positions, "attention_mask": mask}
        expected = lrsa_attention(query, key, value, config, impl="reference", **options)
        for impl in FAST:
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            found = lrsa_attention(*leaves, config, impl=impl, **options)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
            assert torch.isfinite(found).all()
            if mask is not None:
                assert not found.transpose(1, 2)[mask == 0].any(), "padding attends to nothing"
            if found.requires_grad:  # not where all is padding
                assert all(torch.isfinite(x).all() for x in torch.autograd.grad(found.sum(), leaves))
        dropped.append(config.compressed_windows(query.shape[2]) > 0 and mask is None and positions is None)

    check()
    assert sum(dropped) >= 5


@settings(max_examples=60, **common)
@given(attention_inputs(dtypes=(torch.float32, torch.bfloat16, torch.float16)), configs())
def test_attention_in_low_precision(inputs, config):
    """Outputs are averages of values, so their error is a few roundings of the largest score and value."""
    query, key, value, mask, positions = inputs
    options = {"position_ids": positions, "attention_mask": mask}
    found = lrsa_attention(query, key, value, config, **options)
    expected = lrsa_attention(query, key, value, config, impl="reference", **options)
    assert found.dtype == query.dtype and torch.isfinite(found).all()
    largest = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * query.shape[-1] ** -0.5
    budget = 8 * torch.finfo(query.dtype).eps * (1 + largest) * value.double().abs().max()
    assert (found.double() - expected.double()).abs().max() <= budget


@settings(max_examples=60, **common)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=5), st.data())
def test_attention_of_any_shapes(shape, drawn):
    """Shapes that do not fit are refused with a message."""
    query = torch.randn(shape)
    sizes = drawn.draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
    key = torch.randn(drawn.draw(st.sampled_from([shape, sizes])))
    mask = drawn.draw(st.sampled_from([None, torch.ones(1, 2), torch.ones(2, 2, 2)]))
    try:
        found = lrsa_attention(query, key, key, LRSAConfig(1, 2, 1), attention_mask=mask)
    except ValueError as error:
        assert str(error)
    else:
        assert found.shape == query.shape


@settings(max_examples=40, **common)
@given(configs(), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_any_chunks_over_the_cache_equal_one_forward(random_llama, config, chunks, drawn):
    model = apply_lrsa(random_llama, config)
    tokens = sum(chunks)
    pads = drawn.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=3))
    ids = torch.randint(1, 48, (len(pads), tokens), generator=torch.Generator().manual_seed(tokens))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found, start = LRSACache(config), [], 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        for size in chunks:
            stop = start + size
            options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            found.append(model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}, use_cache=True, **options).logits)
            start = stop
    torch.testing.assert_close(torch.cat(found, 1)[mask == 1], expected[mask == 1], atol=1e-9, rtol=0)
    assert cache.layers[0].held() == [config.kept_length(tokens - pad) for pad in pads]
