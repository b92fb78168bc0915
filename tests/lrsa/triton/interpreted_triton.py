"""The Triton kernels against the steps they fuse, on the CPU: run with `TRITON_INTERPRET=1` by test_triton.py.

Triton decides when it is imported whether to interpret, so that these need a process of their own.
"""

import pytest
import torch

from lrsa import LRSAConfig, lag_relative_scores
from lrsa.attention.tiled import merge as merging
from lrsa.triton import merge as merging_triton
from lrsa.triton import scoring as scoring_triton
from tests.lrsa.test_scoring import golden


@pytest.mark.parametrize(
    ("shape", "config", "dtype"),
    [
        ((2, 2, 131, 8), LRSAConfig(4, 16, 2), torch.float32),
        ((1, 3, 200, 80), LRSAConfig(0, 33, 5), torch.float32),  # neither tokens nor channels a power of two
        ((1, 2, 300, 64), LRSAConfig(5, 64, 5, value_weight=0.5), torch.bfloat16),
        ((2, 1, 64, 16), LRSAConfig(3, 5, 2, value_weight=0.0), torch.float64),
        ((1, 1, 50, 1), LRSAConfig(2, 8, 2), torch.float32),
        ((1, 1, 1600, 40), LRSAConfig(3, 512, 2), torch.float32),  # channels in several steps
        ((1, 1, 20, 8), LRSAConfig(2, 16, 2), torch.float32),  # nothing to score
    ],
)
def test_scores(shape, config, dtype):
    torch.manual_seed(0)
    batch, heads, tokens, channels = shape
    keys = torch.randn(batch, tokens, heads, channels).to(dtype).transpose(1, 2)  # as models lay them out
    values = torch.randn(shape).to(dtype) * 100 - 1000
    second = config.sink_size + config.lag_size
    keys[:, :, second : second + config.lag_size, channels // 2] = 3.0  # constant in a reference, not in its window
    found, expected = (f(keys, values, config) for f in (scoring_triton.lag_relative_scores, lag_relative_scores))
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_scores_equal_the_original(shared):
    compared = 0
    for name, config, case in golden(shared):
        scores = scoring_triton.lag_relative_scores(case["k"], case["v"], config)
        assert scores.isfinite().all(), name
        if not name.startswith("const"):  # there LagKV itself yields NaN
            torch.testing.assert_close(scores, case["score"], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared == 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype):
    torch.manual_seed(0)
    whole, lse = torch.randn(1, 200, 3, 40).transpose(1, 2), 5 * torch.randn(1, 200, 3, 1).transpose(1, 2)
    new, new_lse = torch.randn(2, 3, 70, 40).to(dtype), 5 * torch.randn(2, 3, 70, 1)
    results = []
    for function in (merging.merge, merging_triton.merge):
        states = [x.clone(memory_format=torch.preserve_format) for x in (whole, lse)]
        views = [x[0, :, 10:150].unflatten(1, (2, 70)).transpose(0, 1) for x in states]  # two blocks of a row
        function(*views, new, new_lse)
        results.append(states)
    for fast, slow, before in zip(*reversed(results), (whole, lse), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-6)
        assert not torch.equal(fast[:, :, 10:150], before[:, :, 10:150])
        assert torch.equal(fast[:, :, :10], before[:, :, :10]) and torch.equal(fast[:, :, 150:], before[:, :, 150:])
