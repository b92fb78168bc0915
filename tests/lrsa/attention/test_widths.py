"""Values of another width than keys, and keys and values that are expanded from latents."""

import pytest
import torch

from lrsa import LRSAConfig, lrsa_attention
from lrsa.selection import select_tokens
from tests.lrsa.attention.cases import EVERY, FAST, assert_equal, inputs, run

CONFIG = LRSAConfig(3, 8, 2)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("tokens", [15, 60])
@pytest.mark.parametrize("widths", [(12, 8), (8, 12)])
def test_values_of_another_width(impl, tokens, widths):
    (query, key, value), _ = inputs(2, 4, 2, tokens, max(widths))
    cut = ((query, widths[0]), (key, widths[0]), (value, widths[1]))
    states = [x.detach()[..., :width].requires_grad_() for x, width in cut]
    grad = torch.randn(2, 4, tokens, widths[1], dtype=torch.float64)
    found, expected = (run(states, grad, CONFIG, impl=name) for name in (impl, "reference"))
    assert found[0].shape == grad.shape and [x.shape for x in found[1:]] == [x.shape for x in states]
    assert_equal(found, expected)


@pytest.mark.parametrize("impl", EVERY)
def test_latents_are_selected_once_and_expanded(impl):
    """As attention over expanded keys and values, every head of which is scored by the latents."""
    torch.manual_seed(0)
    heads, tokens = 4, 60
    options = {"dtype": torch.float64, "requires_grad": True}
    query, c_kv, k_rope = (torch.randn(2, h, tokens, d, **options) for h, d in ((heads, 12), (1, 16), (1, 4)))
    up = torch.randn(16, heads, 8 + 6, **options)

    def expand(c_kv, k_rope):
        key, value = torch.einsum("bgsr,rhd->bhsd", c_kv, up).split([8, 6], -1)
        return torch.cat([key, k_rope.expand(-1, heads, -1, -1)], -1), value

    found = lrsa_attention(query, c_kv, k_rope, CONFIG, expand=expand, impl=impl)
    kept = select_tokens(torch.cat([c_kv, k_rope], -1), c_kv, CONFIG).index[:, 0]
    key, value = expand(c_kv, k_rope)
    expected = torch.cat([_attend(query[b], key[b], value[b], kept[b]) for b in range(2)])
    assert_equal([found], [expected])
    grads = [torch.autograd.grad(out.sin().sum(), [query, c_kv, k_rope, up]) for out in (found, expected)]
    assert_equal(*grads)


def _attend(query, key, value, kept):
    place = torch.arange(query.shape[1])
    window = (place - CONFIG.sink_size).div(CONFIG.lag_size, rounding_mode="floor")
    seen = (window[:, None] - window <= 1) | (place < CONFIG.sink_size) | torch.isin(place, kept)
    seen &= place[:, None] >= place
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value)[None]
