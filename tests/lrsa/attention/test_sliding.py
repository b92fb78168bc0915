"""Attention within a sliding window or a chunk against a dense mask."""

import pytest
import torch

from lrsa.attention import sliding
from lrsa.attention.sliding import Chunk, sliding_attention
from lrsa.attention.softmax import Softmax


def states(tokens, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def by_mask(query, key, value, window, scale=8**-0.5):
    """The oracle: a `T x T` mask."""
    length = key.shape[2]
    at, other = torch.arange(length - query.shape[2], length)[:, None], torch.arange(length)
    near = at // window == other // window if isinstance(window, Chunk) else at - other < window
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * scale
    weights = scores.masked_fill(~near | (other > at), float("-inf")).softmax(-1)
    return weights @ value.repeat_interleave(2, 1)


def both(function, *args, **options):
    out = function(*args, **options)
    return out, *torch.autograd.grad(out.sin().sum(), [x for x in args if isinstance(x, torch.Tensor)])


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [1, 7, 512])
@pytest.mark.parametrize("window", [1, 12, 49, 50, 51, *map(Chunk, (1, 12, 49, 50, 51))])
def test_equals_a_dense_mask(block, window, monkeypatch):
    monkeypatch.setattr(sliding, "BLOCK", block)
    args = states(50)
    expected = both(by_mask, *args, window, scale=0.2)
    assert_close(both(sliding_attention, *args, window, scale=0.2), expected)
    if window < 50:
        with pytest.raises(AssertionError):
            assert_close(both(sliding_attention, *args, type(window)(window + 1), scale=0.2), expected)


@pytest.mark.parametrize("tokens", [1, 9, 49])
def test_queries_behind_older_keys(tokens, monkeypatch):
    monkeypatch.setattr(sliding, "BLOCK", 7)
    query, key, value = states(50)
    args = query[:, :, -tokens:], key, value, 12
    assert_close([sliding.attend(*args, Softmax(0.3))], [by_mask(*args, 0.3)])


@pytest.mark.parametrize("window", [12, Chunk(12)])
def test_padding_and_packed_documents(window):
    """The window counts the real tokens of a document, wherever they lie."""
    query, key, value = states(60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = mask[1, 50:] = 0
    positions = torch.cat([torch.arange(25), torch.arange(35)]).expand(2, -1)
    out = sliding_attention(query, key, value, window, attention_mask=mask, position_ids=positions)
    for row, first, last in ((0, 9, 25), (0, 25, 60), (1, 0, 25), (1, 25, 50)):
        alone = by_mask(*(x[row : row + 1, :, first:last] for x in (query, key, value)), window)
        assert_close([out[row : row + 1, :, first:last]], [alone])
    assert (out.transpose(1, 2)[mask == 0] == 0).all()
