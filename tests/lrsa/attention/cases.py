"""Inputs for attention, and what "equal" means for them."""

import torch

from lrsa import LRSAConfig, lrsa_attention

FAST = ["native", "tiled"]  # "cudnn" and "flex" need a GPU for their gradients: test_gpu.py
EVERY = ["reference", *FAST]
CONFIGS = [LRSAConfig(*numbers) for numbers in ((4, 16, 2), (0, 8, 3), (3, 5, 5), (1, 7, 1), (16, 32, 8), (2, 1, 1))]


def inputs(batch, heads, kv_heads, tokens, channels=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = ((batch, heads), (batch, kv_heads), (batch, kv_heads), (batch, heads))
    *states, grad = (torch.randn(*shape, tokens, channels, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in states], grad


def run(states, grad, config, **options):
    """Output and gradients for query, key and value."""
    out = lrsa_attention(*states, config, **options)
    return [out.detach(), *torch.autograd.grad(out, states, grad)]


def assert_equal(found, expected, atol=1e-12):
    """fp64 sums of at most a few hundred terms of size 1: rounding stays far below 1e-12, any wrong key far above."""
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=False):
        torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
