"""Sparse attention as a few plain pieces without any mask: nothing is computed that the rule does not ask for.

Windows are taken in pairs. The two windows of a pair see themselves and each other causally (one square), both see the
sink and the kept tokens of everything before the pair's neighbour (one rectangle), and then the first sees the whole
window before the pair while the second sees the kept tokens of that window (two rectangles):

               sink  kept 0 .. 2j-2   kept 2j-1   window 2j-1   window 2j   window 2j+1
    window 2j    x         x                           x          causal
    window 2j+1  x         x              x                         x          causal

The pieces of a row are merged by their log-sum-exp. The backward calls each piece's own backward with the merged
output and log-sum-exp, as PyTorch's context parallelism does. Nothing of size `T x T` exists, and no gradient flows
through the selection.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, C kept tokens and sink, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lrsa.attention import kernels
from lrsa.config import LRSAConfig
from lrsa.selection import select_tokens


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: LRSAConfig, scale: float
) -> torch.Tensor:
    """Attend over rows without padding; the queries are the last `T` of the `S` tokens of each row.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`, with `T <= S`.

    Returns:
        `[B, H, T, D]` in the query's dtype. Memory grows linearly in `S`.
    """
    tokens, length = query.shape[2], key.shape[2]
    if length <= config.dense_length or config.top_k == config.lag_size:
        return _dense(query, key, value, scale)
    # Rows of queries that are already answered are made up, so that the pieces below stay whole: at most two windows
    # of them behind a sink that holds everything older, as in a cache.
    missing = length - tokens
    made_up = missing - config.sink_size if missing >= config.sink_size else missing
    if made_up:
        query = F.pad(query, (0, 0, made_up, 0))
    index = select_tokens(key, value, config).index
    return _Rectangles.apply(query, key, value, index, config, scale)[:, :, made_up:]


def _dense(query, key, value, scale):
    tokens, length = query.shape[2], key.shape[2]
    if tokens == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if tokens == 1 else mask, scale=scale, enable_gqa=True
    )


class Piece(NamedTuple):
    """Some queries over some keys: a square with the diagonal when causal, else a full rectangle."""

    queries: slice
    compact: bool  # keys are taken from [sink | kept], else from the row itself
    keys: slice
    causal: bool


def pieces(length: int, config: LRSAConfig, sink_queries: bool) -> Iterator[list[Piece]]:
    """All pieces of a row of `length` tokens, pair by pair; the first piece of a pair covers all of its queries."""
    sink, lag, kept = config.sink_size, config.lag_size, config.top_k
    if sink_queries and sink:
        yield [Piece(slice(0, sink), False, slice(0, sink), True)]
    for pair, start in enumerate(range(sink, length, 2 * lag)):
        middle, stop = min(start + lag, length), min(start + 2 * lag, length)
        whole, second = slice(start, stop), slice(middle, stop)
        found = [Piece(whole, False, whole, True)]
        far = sink + kept * max(2 * pair - 1, 0)
        if far:
            found.append(Piece(whole, True, slice(0, far), False))
        if pair:
            found.append(Piece(slice(start, middle), False, slice(start - lag, start), False))
            if stop > middle:
                found.append(Piece(second, True, slice(far, far + kept), False))
        yield found


class _Rectangles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, index, config, scale):
        rows, keys, values = _flat(query), _flat(key), _flat(value)
        compact_keys, compact_values = (_compact(x, index, config) for x in (keys, values))
        tokens, before = rows.shape[2], keys.shape[2] - rows.shape[2]
        exact = torch.promote_types(query.dtype, torch.float32)
        # The kernels write token by token, heads inside: so does the output, and models want it that way.
        out = rows.new_empty(1, tokens, rows.shape[1], rows.shape[3], dtype=exact).transpose(1, 2)
        lse = rows.new_empty(1, tokens, rows.shape[1], dtype=exact).transpose(1, 2)
        for pair in pieces(keys.shape[2], config, sink_queries=before == 0):
            for piece in pair:
                part = slice(piece.queries.start - before, piece.queries.stop - before)
                source = (compact_keys, compact_values) if piece.compact else (keys, values)
                piece_out, piece_lse = kernels.forward(
                    rows[:, :, part], *(x[:, :, piece.keys] for x in source), piece.causal, scale
                )
                if piece is pair[0]:
                    out[:, :, part], lse[:, :, part] = piece_out, piece_lse
                else:
                    _merge(out[:, :, part], lse[:, :, part], piece_out.to(exact), piece_lse)
        merged = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, index, merged, lse)
        ctx.config, ctx.scale = config, scale
        return merged.reshape(query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, index, out, lse = ctx.saved_tensors
        config = ctx.config
        grad, rows, keys, values = _flat(grad), _flat(query), _flat(key), _flat(value)
        compact_keys, compact_values = (_compact(x, index, config) for x in (keys, values))
        before = keys.shape[2] - rows.shape[2]
        exact = torch.promote_types(query.dtype, torch.float32)
        grad_rows = torch.empty_like(out, dtype=exact)
        grads = {
            False: [torch.zeros_like(x, dtype=exact) for x in (keys, values)],
            True: [torch.zeros_like(x, dtype=exact) for x in (compact_keys, compact_values)],
        }
        for pair in pieces(keys.shape[2], config, sink_queries=before == 0):
            for piece in pair:
                part = slice(piece.queries.start - before, piece.queries.stop - before)
                source = (compact_keys, compact_values) if piece.compact else (keys, values)
                grad_query, *grad_states = kernels.backward(
                    grad[:, :, part], rows[:, :, part], *(x[:, :, piece.keys] for x in source),
                    out[:, :, part], lse[:, :, part], piece.causal, ctx.scale,
                )  # fmt: skip
                if piece is pair[0]:
                    grad_rows[:, :, part] = grad_query
                else:
                    grad_rows[:, :, part] += grad_query
                for total, found in zip(grads[piece.compact], grad_states, strict=True):
                    total[:, :, piece.keys] += found
        for total, compact in zip(grads[False], grads[True], strict=True):
            _scatter(total, compact, index, config)
        grad_key, grad_value = (x.to(key.dtype).view(key.shape) for x in grads[False])
        return grad_rows.to(query.dtype).reshape(query.shape), grad_key, grad_value, None, None, None


def _flat(states: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` -> `[1, B * H, T, D]`: query heads stay next to their KV head, so rows need no loop."""
    return states.contiguous().flatten(0, 1).unsqueeze(0)


def _compact(states: torch.Tensor, index: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """`[sink | kept]` of flat states: `[1, B * G, C, D]`."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, states.shape[-1])
    return torch.cat([states[:, :, : config.sink_size], states.gather(2, index)], dim=2)


def _scatter(total: torch.Tensor, compact: torch.Tensor, index: torch.Tensor, config: LRSAConfig) -> None:
    """Add gradients of `[sink | kept]` to those of the row; a kept position occurs once, so the order is no matter."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, total.shape[-1])
    total[:, :, : config.sink_size] += compact[:, :, : config.sink_size]
    total.scatter_add_(2, index, compact[:, :, config.sink_size :])


def _merge(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Combine, in place, attention over two disjoint sets of keys."""
    out.lerp_(other_out, torch.sigmoid(other_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)
