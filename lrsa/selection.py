"""Which tokens of every window are kept.

Shapes: B batch, G KV heads, S tokens of a row, W complete windows, K = top_k, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrsa.config import LRSAConfig
from lrsa.scoring import lag_relative_scores


@dataclass(frozen=True)
class Selection:
    """The kept tokens of the windows that have been compressed.

    Attributes:
        index: int64 `[B, G, W - 1, K]`, positions in the row, ascending within each window.
    """

    index: torch.Tensor

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """Take the kept tokens out of `[B, G, S, D]`: `[B, G, (W - 1) * K, D]`, in row order; gradients flow."""
        flat = self.index.flatten(2)
        return states.gather(2, flat.unsqueeze(-1).expand(*flat.shape, states.shape[-1]))


def select_tokens(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> Selection:
    """Keep the `top_k` tokens of highest score of every compressed window, for each KV head.

    Args:
        keys, values: rows from their first real token on, `[B, G, S, D]`.
        config: the settings.

    Returns:
        Selection: of the `W - 1` windows that are followed by a complete one (empty for short rows). On equal scores
        the earlier token is kept.

    Source: LagKV, arXiv 2504.04704, section 3.
    """
    scores = (config.rank or lag_relative_scores)(keys, values, config)
    # A stable sort, because topk promises no order among equals and every copy of a head must keep the same tokens.
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : config.top_k]
    local = order.sort(dim=-1).values
    starts = config.sink_size + config.lag_size * torch.arange(scores.shape[2], device=scores.device)
    return Selection(local + starts[:, None])
