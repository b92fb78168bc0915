"""Attention within a sliding window, for the layers of a model that have one: exact, and without a `T x T` mask.

Queries are taken in blocks, each over the keys that its window reaches. A block computes `BLOCK + window` keys per
query where `window` would do, so the cost is linear in the tokens; memory is that of one block's mask.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lrsa.attention.documents import attend_documents
from lrsa.attention.softmax import Softmax

BLOCK = 512


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in which a query sees itself and the `window - 1` tokens of its document before it.

    Args and returns as `lrsa_attention`; `window` is counted in real tokens.
    """
    attend_rows = functools.partial(attend, window=window, softmax=Softmax.of(query, scale, softcap, sinks))
    return attend_documents(attend_rows, query, key, value, attention_mask, position_ids)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, softmax: Softmax) -> torch.Tensor:
    """Attend over rows without padding; the queries are the last `T` of the `S` tokens of each row.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`, with `T <= S`.

    Returns:
        `[B, H, T, D]` in the query's dtype. A window of at least `S` tokens is dense causal attention.
    """
    tokens, length = query.shape[2], key.shape[2]
    if not softmax.is_plain:
        attention = functools.partial(checkpoint, softmax.attend, use_reentrant=False, preserve_rng_state=False)
    elif tokens == length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax.scale, enable_gqa=True)
    else:
        attention = functools.partial(F.scaled_dot_product_attention, scale=softmax.scale, enable_gqa=True)
    if query.device.type != "cpu":  # elsewhere the kernels with a mask want as many KV heads as query heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    before = length - tokens
    out = []
    for start in range(before, length, BLOCK):
        stop = min(start + BLOCK, length)
        low = max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=key.device)[:, None] - torch.arange(low, stop, device=key.device)
        out.append(
            attention(
                query[:, :, start - before : stop - before],
                key[:, :, low:stop],
                value[:, :, low:stop],
                (distance >= 0) & (distance < window),
            )
        )
    return torch.cat(out, dim=2)
