"""Attention within a sliding window or a chunk, for the layers of a model that have one: exact, and without a `T x T`
mask.

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


class Chunk(int):
    """A window that does not slide: so many tokens are a chunk of their document, and a query sees those of its own."""


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
    """Causal attention in which a query sees itself and the `window - 1` tokens of its document before it, or those of
    them that are in its own `Chunk`.

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
        low = max(_first_seen(start, window), 0)
        at, other = torch.arange(start, stop, device=key.device)[:, None], torch.arange(low, stop, device=key.device)
        out.append(
            attention(
                query[:, :, start - before : stop - before],
                key[:, :, low:stop],
                value[:, :, low:stop],
                (other <= at) & (other >= _first_seen(at, window)),
            )
        )
    return torch.cat(out, dim=2)


def held(seen: int, window: int) -> int:
    """Of `seen` tokens of a document, how many the token after them may see."""
    return seen % window if isinstance(window, Chunk) else min(seen, window)


def _first_seen(position: int | torch.Tensor, window: int) -> int | torch.Tensor:
    return position - position % window if isinstance(window, Chunk) else position - window + 1
