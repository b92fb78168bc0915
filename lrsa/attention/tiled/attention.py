"""Sparse attention as pieces that vendors' dense kernels compute, each visible pair in exactly one of them.

`tiles` cuts a row into rectangles and pieces along the diagonal. Here they are computed one after the
other and merged by their log-sum-exp. The backward calls each piece's own backward with the merged output and
log-sum-exp, as PyTorch's context parallelism does. Nothing of size `T x T` exists, and no gradient flows through the
selection.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, C kept tokens and sink, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from lrsa.attention import sliding
from lrsa.attention.tiled import sdpa as kernels
from lrsa.attention.tiled.merge import merge
from lrsa.attention.tiled.tiles import Piece, pieces
from lrsa.config import LRSAConfig
from lrsa.selection import select_tokens


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: LRSAConfig,
    scale: float,
    vendor: str = "flash",
) -> torch.Tensor:
    """Attend over rows without padding; the queries are the last `T` of the `S` tokens of each row.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`, with `T <= S`.
        vendor: whose kernels compute the pieces, `"flash"` or `"cudnn"`.

    Returns:
        `[B, H, T, D]` in the query's dtype. Memory grows linearly in `S`.

    Raises:
        ValueError: when the vendor's kernels cannot compute these tensors.
    """
    kernels.check(vendor, query)
    tokens, length = query.shape[2], key.shape[2]
    if length <= config.dense_length or config.top_k == config.lag_size:
        return sliding.attend(query, key, value, length, scale)  # a window over everything
    # Rows of queries that are already answered are made up, so that the pieces below stay whole: at most two windows
    # of them behind a sink that holds everything older, as in a cache.
    missing = length - tokens
    made_up = missing - config.sink_size if missing >= config.sink_size else missing
    if made_up:
        query = F.pad(query, (0, 0, made_up, 0))
    return _attend(query, key, value, *_numbers(config), scale, vendor)[0][:, :, made_up:]


# Operators of their own, so that selective checkpointing can keep the output and compilers see one opaque call.
@torch.library.custom_op("lrsa::rectangles", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_size: int,
    lag_size: int,
    top_k: int,
    value_weight: float,
    score: str,
    scale: float,
    vendor: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[B, H, T, D]`, log-sum-exp `[1, B * H, T, 1]` and kept positions `[B, G, W - 1, K]`."""
    config = LRSAConfig(sink_size, lag_size, top_k, value_weight, score=score)
    index = select_tokens(key, value, config).index
    rows, states = _flat(query), _states(key, value, index, config)
    exact = torch.promote_types(query.dtype, torch.float32)
    out, lse = _token_major(rows, exact), _token_major(rows[..., :1], exact)
    for piece, before in _plan(rows, states, config):
        piece_out, piece_lse = kernels.forward(*_take(piece, before, rows, states), piece.causal, scale, vendor)
        piece_lse = piece_lse.unsqueeze(-1)
        out_part, lse_part = (_queries(x, piece, before) for x in (out, lse))
        if piece.causal:  # the first of its queries
            out_part.copy_(piece_out)
            lse_part.copy_(piece_lse)
        else:
            merge(out_part, lse_part, piece_out, piece_lse)
    return out.to(query.dtype).reshape(query.shape), lse, index


@torch.library.custom_op("lrsa::rectangles_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    index: torch.Tensor,
    sink_size: int,
    lag_size: int,
    top_k: int,
    value_weight: float,
    score: str,
    scale: float,
    vendor: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value."""
    config = LRSAConfig(sink_size, lag_size, top_k, value_weight, score=score)
    grad, rows, out, states = _flat(grad), _flat(query), _flat(out), _states(key, value, index, config)
    exact = torch.promote_types(query.dtype, torch.float32)
    grad_rows = _token_major(rows, exact)
    grads = {
        source: [torch.zeros_like(x, dtype=exact, memory_format=torch.contiguous_format) for x in states[source]]
        for source in states
    }
    for piece, before in _plan(rows, states, config):
        grad_part, out_part, lse_part, total = (_queries(x, piece, before) for x in (grad, out, lse, grad_rows))
        taken = _take(piece, before, rows, states)
        grad_query, *grad_states = kernels.backward(
            grad_part, *taken, out_part, lse_part.squeeze(-1), piece.causal, scale, vendor
        )
        if piece.causal:  # the first of its queries
            total.copy_(grad_query)
        else:
            total += grad_query
        for total, found in zip(grads[piece.compact], grad_states, strict=True):
            _add_keys(total, found, piece)
    for total, compact in zip(grads[False], grads[True], strict=True):
        _scatter(total, compact, index, config)
    grad_key, grad_value = (x.to(key.dtype).view(key.shape) for x in grads[False])
    return grad_rows.to(query.dtype).reshape(query.shape), grad_key, grad_value


@_attend.register_fake
def _(query, key, value, sink_size, lag_size, top_k, value_weight, score, scale, vendor):
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = query.new_empty(1, query.shape[0] * query.shape[1], *query.shape[2:])
    windows = (key.shape[2] - sink_size) // lag_size - 1
    index = query.new_empty(*key.shape[:2], windows, top_k, dtype=torch.int64)
    return _token_major(rows, query.dtype).reshape(query.shape), _token_major(rows[..., :1], exact), index


@_attend_backward.register_fake
def _(grad, query, key, value, *rest):
    rows = query.new_empty(1, query.shape[0] * query.shape[1], *query.shape[2:])
    grad_states = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    return _token_major(rows, query.dtype).reshape(query.shape), *grad_states


def _setup(ctx, inputs, output):
    query, key, value, *ctx.numbers = inputs
    out, lse, index = output
    ctx.mark_non_differentiable(lse, index)
    ctx.save_for_backward(query, key, value, out, lse, index)


def _backward(ctx, grad, grad_lse, grad_index):
    return *_attend_backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * len(ctx.numbers)


_attend.register_autograd(_backward, setup_context=_setup)


def _numbers(config: LRSAConfig) -> tuple[int, int, int, float, str]:
    return config.sink_size, config.lag_size, config.top_k, config.value_weight, config.score


def _plan(rows: torch.Tensor, states: dict, config: LRSAConfig) -> Iterator[tuple[Piece, int]]:
    """The pieces of a row, and how many of its tokens come before the first query."""
    length = states[False][0].shape[2]
    before = length - rows.shape[2]
    for piece in pieces(length, config, before == 0, *kernels.sizes(rows)):
        yield piece, before


def _take(piece: Piece, before: int, rows: torch.Tensor, states: dict) -> list[torch.Tensor]:
    """Query, key and value of a piece."""
    return [_queries(rows, piece, before), *(_keys(x, piece) for x in states[piece.compact])]


def _queries(states: torch.Tensor, piece: Piece, before: int) -> torch.Tensor:
    return _blocks(states, piece.query - before, piece.rows, piece.blocks, piece.step)


def _keys(states: torch.Tensor, piece: Piece) -> torch.Tensor:
    return _blocks(states, piece.key, piece.columns, piece.blocks, piece.key_step)


def _add_keys(total: torch.Tensor, found: torch.Tensor, piece: Piece) -> None:
    """Add what the blocks of a piece found for their keys; overlapping blocks are added part by part."""
    part = min(piece.key_step, piece.columns) if piece.blocks > 1 else piece.columns
    for start in range(0, piece.columns, part):
        tokens = min(part, piece.columns - start)
        place = _blocks(total, piece.key + start, tokens, piece.blocks, piece.key_step)
        place += found[:, :, start : start + tokens]


def _blocks(states: torch.Tensor, start: int, tokens: int, blocks: int, step: int) -> torch.Tensor:
    """A view of flat states `[1, H, T, D]` as `[blocks, H, tokens, D]`, one block every `step` tokens."""
    _, by_head, by_token, by_channel = states.stride()
    return states.as_strided(
        (blocks, states.shape[1], tokens, states.shape[3]),
        (step * by_token, by_head, by_token, by_channel),
        states.storage_offset() + start * by_token,
    )


def _flat(states: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` -> `[1, B * H, T, D]`, a view where strides allow: query heads stay next to their KV head."""
    states = states if states.stride(3) == 1 else states.contiguous()
    return states.flatten(0, 1).unsqueeze(0)


def _token_major(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor like flat states, but token by token with the heads inside, as kernels write and models read."""
    _, heads, tokens, channels = rows.shape
    return rows.new_empty(1, tokens, heads, channels, dtype=dtype).transpose(1, 2)


def _states(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, config: LRSAConfig) -> dict:
    """Flat keys and values of the row itself (`False`) and of `[sink | kept]` (`True`)."""
    whole = tuple(_flat(x) for x in (key, value))
    return {False: whole, True: tuple(_compact(x, index, config) for x in whole)}


def _compact(states: torch.Tensor, index: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """`[sink | kept]` of flat states: `[1, B * G, C, D]`."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, states.shape[-1])
    return torch.cat([states[:, :, : config.sink_size], states.gather(2, index)], dim=2)


def _scatter(total: torch.Tensor, compact: torch.Tensor, index: torch.Tensor, config: LRSAConfig) -> None:
    """Add gradients of `[sink | kept]` to those of the row; a kept position occurs once, so the order is no matter."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, total.shape[-1])
    total[:, :, : config.sink_size] += compact[:, :, : config.sink_size]
    total.scatter_add_(2, index, compact[:, :, config.sink_size :])
