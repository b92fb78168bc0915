"""The oracle: dense attention under the visibility mask, slow and plain. Every other implementation must equal it.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import torch

from lrsa.attention.softmax import Softmax
from lrsa.config import LRSAConfig
from lrsa.selection import Selection
from lrsa.visibility import visible


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
    config: LRSAConfig,
    softmax: Softmax,
) -> torch.Tensor:
    """Attend over rows without padding; the queries are the last `T` of the `S` tokens of each row.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`, with `T <= S`.
        selection: the kept tokens of the rows.

    Returns:
        `[B, H, T, D]` in the query's dtype. Takes memory of size `T x S` for every head.
    """
    length = key.shape[2]
    positions = torch.arange(length - query.shape[2], length, device=query.device)
    return softmax.attend(query, key, value, visible(selection, positions, length, config))
