"""What only a GPU can show: flash and cuDNN, FlexAttention's gradients and the compiled Triton kernels.

    python -m pytest tests/lrsa/attention/test_gpu.py      # needs torch, triton, transformers and pytest only

Skipped without a GPU; nothing here has a stand-in.
"""

import pytest
import torch

from lrsa import LRSAConfig, lrsa_attention, select_tokens
from lrsa.attention.tiled.merge import merge
from lrsa.scoring import lag_relative_scores
from tests.lrsa.attention.cases import inputs, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = ["tiled", "cudnn", "flex"]


@pytest.fixture(autouse=True)
def compiled_anew():
    """FlexAttention is compiled for every shape, and only so many times."""
    yield
    torch._dynamo.reset()


def on_gpu(states, grad):
    return [x.detach().cuda().requires_grad_() for x in states], grad.cuda()


def assert_within_budget(impl, states, grad, config, **options):
    """The truth is fp64 of the same inputs; the budget is twice the error of the reference in the inputs' precision."""
    exact = [x.detach().double().requires_grad_() for x in states]
    if not options:  # else a borderline choice would make a difference that no budget means
        assert torch.equal(*(select_tokens(*x[1:], config).index for x in (exact, states)))
    truth = run(exact, grad.double(), config, impl="reference", **options)
    eager = run(states, grad, config, impl="reference", **options)
    found = run(states, grad, config, impl=impl, **options)
    for name, true, slow, fast in zip(("out", "dq", "dk", "dv"), truth, eager, found, strict=True):
        assert (fast.double() - true).norm() <= 2 * (slow.double() - true).norm(), name


@pytest.mark.parametrize("impl", ["tiled", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(4, 4, 64), (8, 2, 128), (7, 1, 128)])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LRSAConfig(16, 128, 32), 1500),
        (LRSAConfig(4, 64, 8), 1111),
        (LRSAConfig(0, 100, 30), 1024),
        (LRSAConfig(1, 128, 1), 1026),  # tiles of one query and of one key
    ],
    ids=str,
)
def test_equals_reference(impl, dtype, heads, kv_heads, channels, config, tokens):
    states, grad = on_gpu(*inputs(2, heads, kv_heads, tokens, channels, dtype))
    assert_within_budget(impl, states, grad, config)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "config", "tokens"),
    [(8, 2, 64, LRSAConfig(16, 128, 32), 1500), (7, 1, 128, LRSAConfig(0, 100, 30), 1024)],
)
def test_flex_equals_reference(heads, kv_heads, channels, config, tokens):
    states, grad = on_gpu(*inputs(1, heads, kv_heads, tokens, channels, torch.bfloat16))
    assert_within_budget("flex", states, grad, config)


@pytest.mark.parametrize("impl", GPU)
def test_layout_of_models(impl):
    """Token by token with the heads inside, and a gradient laid out otherwise: cuDNN's plans must not mix them up."""
    states, grad = on_gpu(*inputs(1, 8, 2, 1500, 64, torch.bfloat16))
    states = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in states]
    for layout in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_within_budget(impl, states, layout, LRSAConfig(16, 128, 32))


@pytest.mark.parametrize("impl", GPU)
def test_padding_and_packing(impl):
    config = LRSAConfig(4, 64, 16)
    states, grad = on_gpu(*inputs(3, 8, 2, 700, 64, torch.bfloat16))
    mask = (torch.arange(700) >= torch.tensor([0, 200, 690])[:, None]).long().cuda()
    assert_within_budget(impl, states, grad * mask[:, None, :, None], config, attention_mask=mask)
    positions = torch.cat([torch.arange(n) for n in (300, 10, 390)])[None].cuda()
    assert_within_budget(impl, states, grad, config, position_ids=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_in_the_open(dtype):
    states, grad = on_gpu(*inputs(1, 4, 2, 500, 32, dtype))
    config = LRSAConfig(4, 64, 16)
    found, expected = (run(states, grad, config, impl=impl) for impl in ("tiled", "reference"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3 if dtype == torch.float32 else 1e-10, rtol=0)


def test_auto_is_a_fast_one():
    states, _ = on_gpu(*inputs(1, 8, 2, 1500, 64, torch.bfloat16))
    config = LRSAConfig(16, 128, 32)
    assert torch.equal(lrsa_attention(*states, config), lrsa_attention(*states, config, impl="tiled"))


@pytest.mark.parametrize(("lag", "channels"), [(128, 64), (512, 128), (33, 80), (1024, 256)])
def test_fused_scores(lag, channels):
    config = LRSAConfig(5, lag, 4)
    keys, values = (torch.randn(2, 3, 4 * lag + 50, channels, dtype=torch.bfloat16) for _ in "kv")
    found = lag_relative_scores(keys.cuda(), values.cuda(), config).cpu()
    torch.testing.assert_close(found, lag_relative_scores(keys, values, config), atol=1e-6, rtol=0)


def test_fused_merge():
    out, lse, new_lse = torch.randn(2, 3, 100, 128), torch.randn(2, 3, 100, 1), torch.randn(2, 3, 100, 1)
    new = torch.randn(2, 3, 100, 128).bfloat16()
    fused = [x.cuda() for x in (out, lse)]
    merge(out, lse, new, new_lse)
    merge(*fused, new.cuda(), new_lse.cuda())
    for one, other in zip(fused, (out, lse), strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-6, rtol=1e-6)
