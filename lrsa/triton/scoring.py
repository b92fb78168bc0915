"""The scores of `lrsa.scoring` in one kernel on a GPU: nothing but scores is written.

Computed step by step, scoring passes over fp32 copies of keys and values about twelve times. Here every window is read
as a window and as the reference of the one before it, the second time mostly from a cache.

Shapes: B batch, G KV heads, S tokens of a row, W complete windows behind its sink, L = lag_size, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lrsa.config import LRSAConfig

TILE = 8192  # elements of a window that a program holds at a time, for every token some channels


def lag_relative_scores(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """As `lrsa.scoring.lag_relative_scores`, for tensors on a GPU and unchecked: fp32 `[B, G, max(W - 1, 0), L]`."""
    batch, kv_heads, length, _ = keys.shape
    windows = max((length - config.sink_size) // config.lag_size - 1, 0)
    scores = keys.new_empty(batch, kv_heads, windows, config.lag_size, dtype=torch.float32)
    if not scores.numel():
        return scores
    tokens = triton.next_power_of_2(config.lag_size)
    with torch.cuda.device_of(keys):  # where Triton launches
        _score[(windows, batch * kv_heads)](
            keys,
            values,
            scores,
            keys.stride(),
            values.stride(),
            kv_heads,
            windows,
            config.sink_size,
            config.value_weight,
            config.lag_size,
            keys.shape[3],
            values.shape[3],
            tokens,
            max(TILE // tokens, 4),
            num_warps=8,
        )
    return scores


@triton.jit
def _score(
    keys,
    values,
    scores,
    key_strides,
    value_strides,
    kv_heads,
    windows,
    sink_size,
    value_weight,
    lag_size: tl.constexpr,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One window of one KV head. `TOKENS` is `lag_size` rounded up to a power of two, `CHANNELS` those of a step."""
    window = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    start = (sink_size + window * lag_size).to(tl.int64)
    score = _softmax(keys, key_strides, head, kv_heads, start, lag_size, key_channels, TOKENS, CHANNELS)
    if value_weight != 0:
        score += value_weight * _softmax(
            values, value_strides, head, kv_heads, start, lag_size, value_channels, TOKENS, CHANNELS
        )
    to = scores + (head.to(tl.int64) * windows + window) * lag_size + token
    tl.store(to, score, mask=token < lag_size)


@triton.jit
def _softmax(
    states,
    strides,
    head,
    kv_heads,
    start,
    lag_size: tl.constexpr,
    channels: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Softmax over the tokens of the window of their std over channels, relative to the window after it."""
    token = tl.arange(0, TOKENS)
    inside = token < lag_size
    base = states + (head // kv_heads).to(tl.int64) * strides[0] + (head % kv_heads).to(tl.int64) * strides[1]
    # Mean and sum of squares around it, of more channels with every step; sums of squares alone would cancel.
    seen = 0.0
    mean = tl.zeros((TOKENS,), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        real = channel < channels
        at = base + (start + token)[:, None] * strides[2] + channel[None, :] * strides[3]
        mask = inside[:, None] & real[None, :]
        reference = tl.load(at + lag_size * strides[2], mask=mask, other=0.0).to(tl.float32)
        low = tl.min(tl.where(mask, reference, float("inf")), 0)
        spread = tl.max(tl.where(mask, reference, float("-inf")), 0) - low
        # A channel that is constant in the reference says nothing: it contributes 0.
        says = real & (spread > 0)
        factor = tl.where(says, tl.minimum(1.0 / tl.where(says, spread, 1.0), 1e30), 0.0)
        low = tl.where(says, low, 0.0)
        state = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        relative = (state - low[None, :]) * factor[None, :]
        count = tl.minimum(channels - first, CHANNELS).to(tl.float32)
        step_mean = tl.sum(relative, 1) / count
        centred = tl.where(real[None, :], relative - step_mean[:, None], 0.0)
        shift = step_mean - mean
        squares += tl.sum(centred * centred, 1) + shift * shift * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
        seen += count
    deviation = tl.sqrt(squares / max(channels - 1, 1))
    # Only a channel that is all but constant overflows; the scores stay finite even then.
    deviation = tl.where(deviation == deviation, tl.minimum(deviation, 3.4028234663852886e38), 0.0)
    weight = tl.where(inside, tl.exp(deviation - tl.max(tl.where(inside, deviation, float("-inf")), 0)), 0.0)
    return weight / tl.sum(weight, 0)
