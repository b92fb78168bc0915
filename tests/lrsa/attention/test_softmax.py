"""Soft caps and attention sinks: every implementation against a softmax that is written out once more here."""

import pytest
import torch

from lrsa import LRSAConfig, lrsa_attention, select_tokens
from lrsa.attention import api, sliding
from lrsa.attention.cpu import build, kernel
from lrsa.attention.softmax import Softmax
from lrsa.cache.compressed import CompressedLayer
from lrsa.cache.sliding import SlidingLayer
from lrsa.visibility import visible
from tests.lrsa.attention.cases import assert_equal, inputs

CONFIG = LRSAConfig(4, 16, 4)
SCALE, CAP = 0.9, 1.5
KINDS = [("native", None, True), ("native", CAP, False), ("native", CAP, True), ("tiled", None, True)]
KINDS += [("reference", CAP, True)]


def sinks_of(heads, dtype=torch.float64):
    return torch.linspace(-2, 2, heads, dtype=dtype).requires_grad_()


def by_hand(query, key, value, seen, softcap, sinks):
    """exp(score) / (exp(sink) + sum of exp(score)), as the models' own eager attention."""
    groups = query.shape[1] // key.shape[1]
    key, value, seen = (x.repeat_interleave(groups, 1) for x in (key, value, seen))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    total = total if sinks is None else total + sinks.exp()[:, None, None]
    return weights / total @ value


def both(attend, states, grad, sinks):
    """Output and gradients for query, key, value and sinks."""
    leaves = [x.detach().clone().requires_grad_() for x in states] + ([] if sinks is None else [sinks])
    out = attend(*leaves[:3])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad[:, :, -out.shape[2] :])]


def equal(found, expected):
    assert_equal(found, expected)
    if len(expected) == 5:
        torch.testing.assert_close(found[4], expected[4], atol=1e-11, rtol=0)


@pytest.mark.parametrize(("impl", "softcap", "with_sinks"), KINDS)
@pytest.mark.parametrize(("tokens", "top_k"), [(20, 4), (131, 4), (131, 16)])  # short, compressed, with nothing dropped
@pytest.mark.parametrize("new", [None, 30])  # queries behind older tokens, as over a cache
def test_equals_the_formula(impl, softcap, with_sinks, tokens, top_k, new):
    states, grad = inputs(2, 6, 2, tokens)
    sinks = sinks_of(6) if with_sinks else None
    first = max(tokens - new, 0) if new else 0
    config = CONFIG.replace(top_k=top_k, sink_size=max(first, 4))
    seen = visible(select_tokens(*states[1:], config), torch.arange(first, tokens), tokens, config)
    found = both(
        lambda q, k, v: api.attend_rows(q[:, :, first:], k, v, config, Softmax(SCALE, softcap, sinks), impl),
        states,
        grad,
        sinks,
    )
    equal(found, both(lambda q, k, v: by_hand(q[:, :, first:], k, v, seen, softcap, sinks), states, grad, sinks))


@pytest.mark.parametrize("block", [7, 512])
def test_sliding_windows(block, monkeypatch):
    monkeypatch.setattr(sliding, "BLOCK", block)
    states, grad = inputs(2, 4, 2, 50)
    sinks = sinks_of(4)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    seen = ((distance >= 0) & (distance < 12)).expand(2, 2, 50, 50)
    options = {"scale": SCALE, "softcap": CAP, "sinks": sinks}
    found = both(lambda *x: sliding.sliding_attention(*x, 12, **options), states, grad, sinks)
    equal(found, both(lambda *x: by_hand(*x, seen, CAP, sinks), states, grad, sinks))


@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("chunks", [[70], [40, 1, 19, 10], [1] * 70], ids=len)
def test_over_the_cache(softcap, chunks):
    states = [x.detach() for x in inputs(2, 6, 2, 70)[0]]
    options = {"scale": SCALE, "softcap": softcap, "sinks": sinks_of(6).detach()}
    expected = {
        "compressed": lrsa_attention(*states, CONFIG, impl="reference", **options),
        **{window: sliding.sliding_attention(*states, window, **options) for window in (12, sliding.Chunk(15))},
    }
    for kind in expected:
        layer = CompressedLayer(CONFIG) if kind == "compressed" else SlidingLayer(kind)
        new = zip(*(x.split(chunks, dim=2) for x in states), strict=True)
        found = torch.cat([layer.attend(*part, **options) for part in new], dim=2)
        assert_equal([found], [expected[kind]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """The budget is twice the error of the reference in that precision, and one rounding for the few sinks."""
    states, grad = inputs(1, 4, 2, 200, 16, dtype)
    sinks = sinks_of(4, dtype)
    exact = [x.detach().double() for x in states], grad.double(), sinks.detach().double().requires_grad_()

    def found(impl, states, grad, sinks, softcap=None):
        options = {"impl": impl, "sinks": sinks, "softcap": softcap}
        return both(lambda *x: lrsa_attention(*x, CONFIG, **options), states, grad, sinks)

    for impl, softcap in (("native", None), ("native", CAP), ("tiled", None)):
        truth, budget = found("reference", *exact, softcap), found("reference", states, grad, sinks, softcap)
        for true, eager, fast in zip(truth, budget, found(impl, states, grad, sinks, softcap), strict=True):
            assert fast.dtype == dtype
            rounding = 2**-8 * true.norm() if true.dim() == 1 else 0
            assert (fast.double() - true).norm() <= 2 * (eager.double() - true).norm() + rounding


@torch.no_grad()
def test_flex():
    states = [x.detach().float() for x in inputs(1, 4, 2, 300)[0]]
    for softcap, sinks in ((CAP, None), (None, sinks_of(4)), (CAP, sinks_of(4))):
        found, expected = (
            lrsa_attention(*states, CONFIG, impl=impl, softcap=softcap, sinks=sinks) for impl in ("flex", "reference")
        )
        assert_equal([found], [expected], 1e-5)


def test_what_cannot_be_done_is_refused():
    states, _ = inputs(1, 4, 2, 60)
    for impl in ("tiled", "cudnn"):
        with pytest.raises(ValueError, match="softcap" if impl == "tiled" else "cudnn"):
            lrsa_attention(*states, CONFIG, impl=impl, softcap=CAP)
    with pytest.raises(ValueError, match="each of the 4 query heads, got \\(3,\\)"):
        lrsa_attention(*states, CONFIG, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="softcap must be above 0"):
        lrsa_attention(*states, CONFIG, softcap=0.0)


def test_without_a_compiler_auto_takes_what_can_cap_scores(monkeypatch):
    def refuse(*_):
        raise build.CompilerError("no compiler")

    states, _ = inputs(1, 4, 2, 60)
    expected = lrsa_attention(*states, CONFIG, softcap=CAP, impl="native")
    monkeypatch.setattr(api, "choose", api.choose.__wrapped__)
    monkeypatch.setattr(kernel, "library", refuse)
    assert_equal([lrsa_attention(*states, CONFIG, softcap=CAP)], [expected])
