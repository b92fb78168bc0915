"""`lrsa_attention`: every implementation against the reference, padding, packing, causality, precision, memory."""

import logging

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import peak_bytes
from lrsa import LRSAConfig, lrsa_attention
from lrsa.attention import api
from lrsa.attention.documents import find_documents
from lrsa.attention.tiled import attention as tiled
from tests.lrsa.attention.cases import CONFIGS, EVERY, FAST, assert_equal, inputs, run


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("tokens", [1, 9, 36, 37, 50, 64, 97, 131])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_reference(impl, tokens, config):
    for heads, kv_heads, batch in ((4, 4, 1), (4, 2, 2), (8, 2, 1), (7, 1, 1)):
        states, grad = inputs(batch, heads, kv_heads, tokens)
        assert_equal(run(states, grad, config, impl=impl), run(states, grad, config, impl="reference"))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("channels", [16, 80, 256])
def test_equals_reference_in_any_head_dim(impl, channels):
    states, grad = inputs(1, 4, 2, 90, channels)
    config = LRSAConfig(4, 16, 4)
    assert_equal(run(states, grad, config, impl=impl), run(states, grad, config, impl="reference"), 1e-11)


@pytest.mark.parametrize("impl", FAST)
def test_non_contiguous_states_and_scale(impl):
    states, grad = inputs(2, 4, 2, 70)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in states]
    config = LRSAConfig(4, 16, 4)
    assert_equal(
        run(strided, grad, config, impl=impl, scale=0.2), run(states, grad, config, impl="reference", scale=0.2)
    )


@pytest.mark.parametrize("impl", FAST)
def test_channels_that_are_not_neighbours(impl):
    """Every second channel of wider states, and the gradient of a sum, whose elements are all the same place."""
    config = LRSAConfig(4, 16, 4)
    states, _ = inputs(2, 4, 2, 70)
    wide = [torch.stack([x.detach(), -x.detach()], -1).flatten(-2).requires_grad_() for x in states]
    found = {}
    for name in (impl, "reference"):
        out = lrsa_attention(*(x[..., ::2] for x in wide), config, impl=name)
        found[name] = [out.detach(), *torch.autograd.grad(out.sum(), wide)]
    assert_equal(found[impl], found["reference"])


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(impl, dtype):
    """The truth is fp64 of the same rounded inputs; the budget is twice the error of the reference in that precision.

    A bf16 kernel rounds its probabilities, which the reference in bf16 does as well, so that budget is a fair one.
    """
    config = LRSAConfig(8, 32, 8)
    states, grad = inputs(2, 4, 2, 300, 32, dtype)
    exact = [x.detach().double().requires_grad_() for x in states]
    truth = run(exact, grad.double(), config, impl="reference")
    budget = run(states, grad, config, impl="reference")
    found = run(states, grad, config, impl=impl)
    for name, true, eager, fast in zip(("out", "dq", "dk", "dv"), truth, budget, found, strict=True):
        assert fast.dtype == dtype, name
        allowed = 2 * (eager.double() - true).norm()
        assert (fast.double() - true).norm() <= allowed, name


def test_keeping_everything_is_dense():
    states, grad = inputs(2, 4, 2, 100)
    dense = F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
    expected = [dense.detach(), *torch.autograd.grad(dense, states, grad)]
    for impl in EVERY:
        assert_equal(run(states, grad, LRSAConfig(4, 16, 16), impl=impl), expected)
        with pytest.raises(AssertionError):
            assert_equal(run(states, grad, LRSAConfig(4, 16, 15), impl=impl), expected)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("side", ["left", "right", "both", "hole"])
def test_padded_row_equals_row_alone(impl, side):
    config = LRSAConfig(4, 8, 2)
    lengths, tokens = [97, 60, 5, 96, 33], 97
    states, grad = inputs(len(lengths), 4, 2, tokens)
    mask = torch.zeros(len(lengths), tokens, dtype=torch.long)
    for row, length in enumerate(lengths):
        before = {"left": tokens - length, "right": 0, "both": (tokens - length) // 2, "hole": 0}[side]
        mask[row, before : before + length] = 1
    if side == "hole":  # a turn of a conversation that ended early
        mask[1, 20:40] = 0
    found = run(states, grad * mask[:, None, :, None], config, impl=impl, attention_mask=mask)
    for row in range(len(lengths)):
        real = mask[row].bool()
        alone = [x.detach()[row : row + 1, :, real].requires_grad_() for x in states]
        expected = run(alone, grad[row : row + 1, :, real], config, impl=impl)
        assert_equal([x[row : row + 1, :, real] for x in found], expected)
    outside = ~mask.bool()[:, None, :, None]
    assert all((x * outside).abs().max() == 0 for x in found)
    if side != "right":  # behind a row's end, causality alone protects it
        wrong = run(states, grad * mask[:, None, :, None], config, impl=impl)
        with pytest.raises(AssertionError):
            assert_equal([x * ~outside for x in wrong], found)


@pytest.mark.parametrize("impl", EVERY)
def test_packed_documents_equal_documents_alone(impl):
    config = LRSAConfig(4, 8, 2)
    lengths = [1, 50, 37, 1, 1, 20, 64, 3]
    states, grad = inputs(1, 4, 2, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = run(states, grad, config, impl=impl, position_ids=positions)
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        part = slice(start, start + length)
        alone = [x.detach()[:, :, part].requires_grad_() for x in states]
        assert_equal([x[:, :, part] for x in found], run(alone, grad[:, :, part], config, impl=impl))
    with pytest.raises(AssertionError):
        assert_equal(run(states, grad, config, impl=impl), found)


def earliest_change(config, impl, token, tokens=120):
    """First output that changes when `token` does."""
    states, _ = inputs(1, 4, 2, tokens)
    before = lrsa_attention(*states, config, impl=impl)
    changed = [x.detach().clone() for x in states]
    for x in changed:
        x[:, :, token] += 3.0
    after = lrsa_attention(*changed, config, impl=impl)
    return (before != after).any(dim=(0, 1, 3)).nonzero()[0].item()


@pytest.mark.parametrize("impl", EVERY)
def test_causal(impl, monkeypatch):
    config = LRSAConfig(4, 8, 2)
    assert all(earliest_change(config, impl, token) == token for token in range(120))
    if impl == "tiled":  # let a window see what was selected with its own tokens as reference
        true_tiles = tiled.tiles

        def leaky(*args):
            for tile in true_tiles(*args):
                leaks = tile.compact and tile.rows == config.lag_size and tile.blocks > 1
                yield tile._replace(columns=tile.columns + leaks * config.top_k)

        monkeypatch.setattr(tiled, "tiles", leaky)
        assert any(earliest_change(config, impl, token) < token for token in range(119))


def peak_of(tokens, impl):
    """Peak memory of forward and backward, from the allocator's own events."""
    states, grad = inputs(1, 4, 2, tokens, 16, torch.float32)
    return peak_bytes(lambda: run(states, grad, LRSAConfig(4, 64, 16), impl=impl))


def test_memory_grows_linearly():
    for impl in FAST:
        small, large = peak_of(512, impl), peak_of(2048, impl)
        assert large < 4.2 * small, (impl, small, large)
    assert peak_of(2048, "reference") > 12 * peak_of(512, "reference")


def test_similar_lengths_share_a_group():
    mask = (torch.arange(100) < torch.tensor([100, 90, 80, 10, 9])[:, None]).long()
    groups = find_documents(mask, None, (5, 100))
    assert [group.shape for group in groups] == [(2, 100), (1, 80), (2, 10)]
    assert find_documents(torch.ones(2, 4), torch.arange(4)[None], (2, 4))[0].whole


def test_mask_changed_in_place_is_seen():
    mask = torch.ones(1, 10, dtype=torch.long)
    assert find_documents(mask, None, (1, 10))[0].whole
    mask[0, :3] = 0
    assert find_documents(mask, None, (1, 10))[0].shape == (1, 7)


def test_mask_changed_in_place_is_seen_in_inference_mode():
    with torch.inference_mode():
        mask = torch.ones(1, 10, dtype=torch.long)
        assert find_documents(mask, None, (1, 10))[0].whole
        mask[0, :3] = 0
        assert find_documents(mask, None, (1, 10))[0].shape == (1, 7)


def test_rows_without_a_real_token():
    states, _ = inputs(2, 4, 2, 30)
    mask = torch.zeros(2, 30, dtype=torch.long)
    assert lrsa_attention(*states, LRSAConfig(2, 4, 1), attention_mask=mask).abs().max() == 0


def test_auto_says_once_what_it_chose(caplog):
    api.choose.cache_clear()
    states, _ = inputs(1, 4, 2, 30)
    with caplog.at_level(logging.INFO, logger="lrsa"):
        for _ in range(3):
            lrsa_attention(*states, LRSAConfig(2, 4, 1))
    assert len(caplog.records) == 1 and "native" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "flash"}, "impl must be 'auto' or one of 'reference'"),
        ({"key": torch.randn(1, 3, 30, 8)}, "key and value must agree in batch, heads and tokens"),
        ({"query": torch.randn(1, 4, 29, 8)}, "LRSACache"),
        (
            {"key": torch.randn(1, 2, 30, 8).half()},
            "one dtype and be on one device, got .*float32 on cpu, torch.float16",
        ),
        ({"value": torch.randn(1, 2, 30, 8, device="meta")}, "torch.float32 on cpu, torch.float32 on meta: convert"),
        ({"query": torch.randn(1, 3, 30, 8)}, r"query heads \(3\) must be a multiple of KV heads \(2\)"),
        (dict.fromkeys(("query", "key", "value"), torch.randn(1, 2, 30, 0)), "at least one head and one channel"),
        (dict.fromkeys(("key", "value"), torch.randn(1, 0, 30, 8)), "at least one head and one channel"),
        ({"query": torch.randn(4, 30, 8)}, "got 3D and 4D"),
        ({"attention_mask": torch.ones(1, 1, 30, 30)}, r"2D padding mask \[1, 30\], got \(1, 1, 30, 30\)"),
        ({"position_ids": torch.arange(29)[None]}, r"position_ids must be \[1, 30\]"),
    ],
)
def test_wrong_input_is_named(change, message):
    states = {"query": torch.randn(1, 4, 30, 8), "key": torch.randn(1, 2, 30, 8), "value": torch.randn(1, 2, 30, 8)}
    with pytest.raises(ValueError, match=message):
        lrsa_attention(config=LRSAConfig(2, 4, 1), **(states | change))
