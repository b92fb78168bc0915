"""Latent attention (MLA): a token is stored once for all heads, and every head's key and value are expanded from that.

The latent of a token is `c_kv`, from which its values and the keys without positions are expanded, and `k_rope`, a
part with positions that all heads share. Tokens are scored and selected by their latents, as one KV head whose key is
the whole latent and whose value is `c_kv`; so one selection holds for all heads, and what is not selected need not be
stored or expanded. Until `expand` is called, `c_kv` stands where keys do, and `k_rope` where values do.

Shapes: B batch, H heads, S tokens, R rank of `c_kv`, P channels of `k_rope`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lrsa.config import LRSAConfig
from lrsa.selection import Selection, select_tokens

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Latents `[B, 1, S, R]` and `[B, 1, S, P]` -> keys and values `[B, H, S, D]`, `[B, H, S, Dv]`."""


def scored(c_kv: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values `[B, 1, S, R + P]`, `[B, 1, S, R]` by which tokens are scored."""
    return torch.cat([c_kv, k_rope], dim=-1), c_kv


def select_latents(c_kv: torch.Tensor, k_rope: torch.Tensor, config: LRSAConfig) -> Selection:
    """`select_tokens` of latents `[B, 1, S, R]` and `[B, 1, S, P]`: one selection for all heads."""
    return select_tokens(*scored(c_kv, k_rope), config)
