"""Attention by FlexAttention: its mask and its blocks against the rule. Its backward needs a GPU: test_gpu.py."""

import pytest
import torch

from lrsa import LRSAConfig, lrsa_attention
from lrsa.attention import flex
from lrsa.attention.softmax import Softmax
from tests.lrsa.attention.cases import inputs

CASES = [
    (LRSAConfig(16, 64, 16), 700),
    (LRSAConfig(0, 128, 32), 1000),
    (LRSAConfig(150, 100, 7), 900),
    (LRSAConfig(3, 300, 299), 1300),
    (LRSAConfig(1, 7, 1), 400),
]


def attend(config, tokens, impl):
    states, _ = inputs(2, 4, 2, tokens)
    with torch.no_grad():
        return lrsa_attention(*states, config, impl=impl)


@pytest.mark.parametrize(("config", "tokens"), CASES, ids=str)
def test_equals_reference(config, tokens):
    torch.testing.assert_close(attend(config, tokens, "flex"), attend(config, tokens, "reference"), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("config", "tokens"), CASES, ids=str)
def test_blocks_hold_what_the_rule_says(config, tokens):
    """No block with a visible pair is skipped, none without one is computed, and no hidden pair goes unmasked."""
    layout = flex.Layout(config.sink_size, config.lag_size, config.top_k, tokens)
    query = torch.arange(layout.sink + layout.row)[:, None]
    key = torch.arange(layout.sink + layout.kept + layout.row)
    pairs = layout.rule()(0, 0, query, key).unflatten(1, (-1, flex.BLOCK)).unflatten(0, (-1, flex.BLOCK))
    some, every = layout.blocks()
    assert torch.equal(some, pairs.any(3).any(1))
    assert not (every & ~pairs.all(3).all(1)).any()
    behind_sink = slice(layout.sink // flex.BLOCK, None)
    assert torch.equal(every[behind_sink], pairs.all(3).all(1)[behind_sink])
    mask = layout.mask(torch.device("cpu"))
    dense = mask.to_dense()[0, 0].bool()
    assert torch.equal(dense, some), "to_dense() adds full blocks to partial ones"
    assert mask.kv_indices.shape == mask.full_kv_indices.shape


def test_compiled_kernel_follows_the_blocks(monkeypatch):
    """The eager form only reads the mask; a compiled kernel, here PyTorch's for CPUs, skips blocks by their indices."""
    monkeypatch.setattr(flex, "flex_attention", flex._compiled())
    states = [x.detach().float() for x in inputs(1, 4, 2, 700)[0]]
    config = LRSAConfig(16, 64, 16)
    found = lrsa_attention(*states, config, impl="flex")
    torch.testing.assert_close(found, lrsa_attention(*states, config, impl="reference"), atol=5e-6, rtol=0)


def test_only_whole_rows():
    states, _ = inputs(1, 4, 2, 400)
    with pytest.raises(ValueError, match=r"takes whole rows, got 10 queries of 400"):
        flex.attend(states[0][:, :, :10], *states[1:], None, LRSAConfig(4, 16, 4), Softmax(0.3))


def test_no_gradients_on_a_cpu():
    states, _ = inputs(1, 4, 2, 400)
    with pytest.raises(ValueError, match="no gradients on a CPU: use impl='auto'"):
        lrsa_attention(*states, LRSAConfig(4, 16, 4), impl="flex")
