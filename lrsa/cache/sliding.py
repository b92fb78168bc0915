"""The cache of a layer with a sliding window or chunks: a ring of the last tokens, which a query may read in any order.

Token `t` of a row lies at `t % window`, so a new token overwrites the one that leaves the window, and nothing moves. A
full chunk is forgotten.

Shapes: B batch, H query heads, G KV heads, T new tokens, S tokens, D head dim.
"""

from __future__ import annotations

import torch

from lrsa.attention import sliding
from lrsa.attention.softmax import Softmax
from lrsa.cache.rows import RowsLayer, on_device


class SlidingLayer(RowsLayer):
    """The cache of a layer whose queries see themselves and the `window - 1` tokens before, or those of a `Chunk`."""

    is_sliding = True

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def length(self, seen: int) -> int:
        return sliding.held(seen, self.window)

    def _place(self, seen: int) -> int:
        return seen % self.window

    def _attend_whole(self, query, key, value, impl: str, **options) -> torch.Tensor:
        return sliding.sliding_attention(query, key, value, self.window, **options)

    def _attend_behind(self, query, keys, values, seen: int, softmax: Softmax, impl: str) -> torch.Tensor:
        return sliding.attend(query, keys, values, self.window, softmax)

    def _in_order(self, states: torch.Tensor, seen: int) -> torch.Tensor:
        """What is held of rows of `seen` tokens, earliest first."""
        held = self.length(seen)
        return states[:, :, :held].roll(held - self._place(seen), dims=2)

    def _remains(self, keys, values, lengths: list[int], seen: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The rings of rows of `lengths` tokens, which come behind `seen - length(seen)` older ones."""
        gone = seen - self.length(seen)
        last = on_device(lengths, keys.device)[:, None] + gone - 1
        place = torch.arange(max(self.length(n + gone) for n in lengths), device=keys.device)
        token = (last - (last - place) % self.window - gone).clamp(min=0)[:, None, :, None]
        return tuple(x.gather(2, token.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values))

    def _drop(self, before: list[int]) -> None:
        """Nothing to do: new tokens overwrite."""
