"""How much each token of a window stands out, measured in the value range of the window that follows it.

Shapes: B batch, G KV heads, S tokens of a row, W complete windows behind its sink, L = lag_size, D head dim.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil

import torch

from lrsa.config import LRSAConfig

logger = logging.getLogger(__name__)


def lag_relative_scores(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """Score every token of every complete window that has a complete window after it.

    Args:
        keys: post-RoPE keys of whole rows from their first real token on, `[B, G, S, D]`.
        values: `[B, G, S, Dv]`.
        config: `sink_size`, `lag_size` and `value_weight` are used.

    Returns:
        fp32 scores `[B, G, max(W - 1, 0), L]`, always finite; higher is kept first. No gradient flows through them.

    Raises:
        ValueError: when the shapes do not belong together.

    Source: LagKV, arXiv 2504.04704, section 3; used for training by LRSA, arXiv 2506.11498.
    """
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            "keys and values must be [batch, kv_heads, tokens, head_dim] of the same batch, heads and tokens, "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if keys.is_cuda and has_triton():
        from lrsa.triton import scoring as scoring_triton

        return scoring_triton.lag_relative_scores(keys.detach(), values.detach(), config)
    with torch.no_grad():
        scores = _window_softmax(keys, config)
        if config.value_weight:
            scores = scores + config.value_weight * _window_softmax(values, config)
    return scores


@functools.cache
def has_triton() -> bool:
    """Whether Triton can compile here: besides the package it needs a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return True
    logger.warning("lrsa scores and merges step by step, which is slower: Triton needs gcc or clang, or one in CC.")
    return False


def _window_softmax(states: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    states = states.float() if states.dtype == torch.float64 else states
    return window_deviation(states, config).softmax(dim=-1)


def window_deviation(states: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """Std over channels, after min-max normalisation by the next window: fp32 `[B, G, max(W - 1, 0), L]`.

    Differentiable, unlike the scores: the training objective "selection" teaches it which tokens to single out.
    """
    count = max(states.shape[2] - config.sink_size, 0) // config.lag_size
    if count < 2:
        return states.new_zeros(*states.shape[:2], 0, config.lag_size, dtype=torch.float32)
    exact = torch.promote_types(states.dtype, torch.float32)
    body = states[:, :, config.sink_size : config.sink_size + count * config.lag_size]
    windows = body.reshape(*states.shape[:2], count, config.lag_size, states.shape[-1])
    window, reference = windows[:, :, :-1].to(exact), windows[:, :, 1:]
    low, high = reference.amin(3, keepdim=True).to(exact), reference.amax(3, keepdim=True).to(exact)
    spread = high - low
    # A channel that is constant in the reference says nothing: it contributes 0, where LagKV divides by zero.
    factor = torch.where(spread > 0, spread, torch.inf).reciprocal().clamp(max=1e30)
    normalised = (window - low) * factor
    # The same as normalised.std(-1), which PyTorch computes fifteen times slower on a CPU.
    centred = normalised - normalised.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=-1) / max(states.shape[-1] - 1, 1) ** 0.5
    # Only a channel that is all but constant overflows; the scores stay finite even then.
    return deviation.nan_to_num()
