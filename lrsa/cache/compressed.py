"""The same rule as a KV cache: a window is cut down to its kept tokens once the window after it is complete.

A row lies in the buffer as `[sink | kept | last windows]`.

Shapes: B batch, H query heads, G KV heads, T new tokens, S tokens, D head dim.
"""

from __future__ import annotations

import torch

from lrsa.attention.api import attend_rows, lrsa_attention
from lrsa.attention.softmax import Softmax
from lrsa.cache.rows import RowsLayer, on_device
from lrsa.config import LRSAConfig
from lrsa.selection import Selection, select_tokens


class CompressedLayer(RowsLayer):
    """The cache of a layer that attends to everything.

    Args:
        config: what is kept.
        prefill: as `LRSACache` takes it.
    """

    is_sliding = False

    def __init__(self, config: LRSAConfig, prefill: str = "sparse"):
        super().__init__()
        self.config = config
        # A rule that keeps everything is dense attention; what is dropped afterwards is another matter.
        self.attention = config if prefill == "sparse" else config.full()

    def length(self, seen: int) -> int:
        return self.config.kept_length(seen)

    _place = length  # behind what the row holds

    def _far(self, seen: int) -> int:
        """Length of `[sink | kept]` of a row; to the tokens behind it, all of that is one long sink."""
        return self.config.sink_size + self.config.compressed_windows(seen) * self.config.top_k

    def _attend_whole(self, query, key, value, impl: str, **options) -> torch.Tensor:
        return lrsa_attention(query, key, value, self.attention, impl=impl, **options)

    def _attend_behind(self, query, keys, values, seen: int, softmax: Softmax, impl: str) -> torch.Tensor:
        return attend_rows(query, keys, values, self.attention.replace(sink_size=self._far(seen)), softmax, impl)

    def _in_order(self, states: torch.Tensor, seen: int) -> torch.Tensor:
        """What is held of rows of `seen` tokens, earliest first."""
        return states[:, :, : self.length(seen)]

    def _remains(self, keys, values, lengths: list[int], seen: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What remains of rows of `lengths` tokens, `seen` of which had been seen before and were cut then."""
        return _compress(keys, values, lengths, self.config.replace(sink_size=self._far(seen)), self._select)

    def _select(self, keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> Selection:
        return select_tokens(keys, values, config)

    def _drop(self, before: list[int]) -> None:
        """In rows that hold two full windows, cut the first down to its kept tokens and close the gap, in place."""
        count = self.config.compressed_windows
        rows = [row for row, seen in enumerate(self.seen) if count(seen) > count(before[row])]
        if not rows:
            return
        lag, device = self.config.lag_size, self.keys.device
        far = on_device((self._far(before[row]) for row in rows), device)[:, None, None]
        row = on_device(rows, device)[:, None, None]
        head = torch.arange(self.keys.shape[1], device=device)[None, :, None]
        window = torch.arange(2 * lag, device=device)
        near = [buffer[row, head, far + window] for buffer in (self.keys, self.values)]
        kept = self._select(*near, self.config.replace(sink_size=0)).index.flatten(2)
        stays = torch.cat([kept, window[lag:].expand(*kept.shape[:2], -1)], dim=2)
        place = far + torch.arange(stays.shape[2], device=device)
        for buffer, states in zip((self.keys, self.values), near, strict=True):
            buffer[row, head, place] = states.gather(2, stays.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def _compress(keys, values, lengths: list[int], config: LRSAConfig, select) -> tuple[torch.Tensor, torch.Tensor]:
    """What remains of rows of `lengths` tokens, left-aligned, once every window with a complete successor is cut."""
    length = max(lengths)
    keys, values = keys[:, :, :length], values[:, :, :length]
    counts = [config.compressed_windows(n) for n in lengths]
    if not any(counts):
        return keys.clone(), values.clone()
    device = keys.device
    position = torch.arange(length, device=device)
    near = config.sink_size + config.lag_size * on_device(counts, device)[:, None]
    stays = ((position < config.sink_size) | (position >= near))[:, None].repeat(1, keys.shape[1], 1)
    index = select(keys, values, config).index.flatten(2)
    stays |= torch.zeros_like(stays).scatter_(2, index, True)
    stays &= (position < on_device(lengths, device)[:, None])[:, None]
    held = max(config.kept_length(n) for n in lengths)
    order = (~stays).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :held, None]
    return tuple(x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
