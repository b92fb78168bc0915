"""Which key a query sees: the whole rule of Lag-Relative Sparse Attention, in one function.

Shapes: B batch, G KV heads, T query tokens, S key tokens, W complete windows, K = top_k.
"""

from __future__ import annotations

import torch

from lrsa.config import LRSAConfig
from lrsa.selection import Selection


def visible(selection: Selection, query_positions: torch.Tensor, length: int, config: LRSAConfig) -> torch.Tensor:
    """Say for every query and key whether the query sees the key.

    A query sees a key that is not after it and is a sink, or lies in its own or the previous window, or was selected
    in its window.

    Args:
        selection: kept tokens of the row, `index` `[B, G, W - 1, K]`.
        query_positions: positions of the queries in the row, `[T]`.
        length: number of keys, `S`; key `k` has position `k`.
        config: the settings.

    Returns:
        bool `[B, G, T, S]`.

    Source: LRSA, arXiv 2506.11498, section 3.
    """
    key = torch.arange(length, device=query_positions.device)
    query = query_positions[:, None]
    kept = torch.zeros(*selection.index.shape[:2], length, dtype=torch.bool, device=key.device)
    kept.scatter_(2, selection.index.flatten(2), True)
    near = _window(query, config) - _window(key, config) <= 1
    return (key <= query) & ((key < config.sink_size) | near | kept[:, :, None])


def _window(position: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """Window of a token; the sink counts as lying before window 0."""
    return torch.div(position - config.sink_size, config.lag_size, rounding_mode="floor")
