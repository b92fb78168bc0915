"""`lrsa.attention.tiled.merge` in one kernel on a GPU: step by step it moves more than twice as many bytes.

Shapes: N blocks, H query heads, T queries of a block, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 64  # queries of a program


def merge(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """As `lrsa.attention.tiled.merge.merge`, for tensors on a GPU."""
    blocks, heads, queries, channels = out.shape
    with torch.cuda.device_of(out):  # where Triton launches
        _merge[(blocks * heads, triton.cdiv(queries, ROWS))](
            out,
            lse,
            new_out,
            new_lse,
            out.stride(),
            lse.stride(),
            new_out.stride(),
            new_lse.stride(),
            heads,
            queries,
            channels,
            ROWS,
            triton.next_power_of_2(channels),
        )


@triton.jit
def _merge(
    out,
    lse,
    new_out,
    new_lse,
    out_strides,
    lse_strides,
    new_out_strides,
    new_lse_strides,
    heads,
    queries,
    channels: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    real = row < queries
    both = real[:, None] & (channel < channels)
    old_at = lse + block * lse_strides[0] + head * lse_strides[1] + row * lse_strides[2]
    new_at = new_lse + block * new_lse_strides[0] + head * new_lse_strides[1] + row * new_lse_strides[2]
    old = tl.load(old_at, mask=real, other=0.0)
    new = tl.load(new_at, mask=real, other=0.0)
    top = tl.maximum(old, new)
    total = tl.exp(old - top) + tl.exp(new - top)
    weight = tl.exp(new - top) / total
    at = out + block * out_strides[0] + head * out_strides[1] + row[:, None] * out_strides[2] + channel * out_strides[3]
    new_at = new_out + block * new_out_strides[0] + head * new_out_strides[1]
    new_at += row[:, None] * new_out_strides[2] + channel * new_out_strides[3]
    known = tl.load(at, mask=both, other=0.0)
    added = tl.load(new_at, mask=both, other=0.0).to(known.dtype)
    tl.store(at, known + (added - known) * weight[:, None], mask=both)
    tl.store(old_at, top + tl.log(total), mask=real)
