"""The cache of a layer with latent attention: it holds what all heads share, and expands what it holds to attend.

`keys` holds `c_kv` and `values` holds `k_rope`, as in the model's own cache.
"""

from __future__ import annotations

import torch

from lrsa.attention.api import attend_rows, lrsa_attention
from lrsa.attention.softmax import Softmax
from lrsa.cache.compressed import CompressedLayer
from lrsa.config import LRSAConfig
from lrsa.latent import Expand, select_latents
from lrsa.selection import Selection


class LatentLayer(CompressedLayer):
    """A `CompressedLayer` of latents, with one selection for all heads."""

    def attend(self, *args, expand: Expand, **options) -> torch.Tensor:
        """As `RowsLayer.attend`; `expand` makes keys and values of latents, and is not held: it is of a model."""
        self._expand = expand
        try:
            return super().attend(*args, **options)
        finally:
            del self._expand

    def _attend_whole(self, query, key, value, impl: str, **options) -> torch.Tensor:
        return lrsa_attention(query, key, value, self.attention, impl=impl, expand=self._expand, **options)

    def _attend_behind(self, query, keys, values, seen: int, softmax: Softmax, impl: str) -> torch.Tensor:
        config = self.attention.replace(sink_size=self._far(seen))
        return attend_rows(query, keys, values, config, softmax, impl, self._expand)

    def _expanded(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._expand(keys, values)

    def _select(self, keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> Selection:
        return select_latents(keys, values, config)
