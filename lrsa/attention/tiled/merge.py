"""Merges what attention over some keys gave with what attention over others gave, by their log-sum-exp.

Shapes: N blocks, H query heads, T queries of a block, D head dim.
"""

from __future__ import annotations

import torch

from lrsa.scoring import has_triton


def merge(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Merge new keys' output and log-sum-exp into the old ones', in place.

    Args:
        out: `[N, H, T, D]` in fp32 or fp64, possibly a view; lse: `[N, H, T, 1]`, likewise.
        new_out: `[N, H, T, D]` in any dtype; new_lse: `[N, H, T, 1]`.
    """
    if out.is_cuda and has_triton():
        from lrsa.triton.merge import merge as fused

        fused(out, lse, new_out, new_lse)
        return
    out.lerp_(new_out.to(out.dtype), torch.sigmoid(new_lse - lse))
    lse.copy_(torch.logaddexp(lse, new_lse))
