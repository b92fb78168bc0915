"""Sparse attention by PyTorch's dense kernels, tile by tile, each visible pair in exactly one tile.

`tiles` divides a row. Here the tiles are computed one after the other and merged by their log-sum-exp. The backward
calls each tile's own backward with the merged output and log-sum-exp, as PyTorch's context parallelism does. Nothing of
size `T x T` exists, and no gradient flows through the selection.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, C kept tokens and sink, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from lrsa.attention.softmax import Softmax, sinks_gradient
from lrsa.attention.tiled import sdpa
from lrsa.attention.tiled.merge import merge
from lrsa.attention.tiled.tiles import Tile, tiles
from lrsa.config import LRSAConfig
from lrsa.selection import Selection


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
    config: LRSAConfig,
    softmax: Softmax,
    backend: str = "flash",
) -> torch.Tensor:
    """`lrsa.attention.reference.attend` in memory that grows linearly in `S`.

    Args:
        backend: whose kernels compute the tiles, `"flash"` or `"cudnn"`.

    Raises:
        ValueError: when the backend's kernels cannot compute these tensors.
    """
    sdpa.check(backend, query)
    if softmax.softcap is not None:
        raise ValueError("impl='tiled' and 'cudnn' cannot cap scores (softcap), as PyTorch's kernels: use impl='auto'.")
    # Zeros stand for queries that are already computed, so that the tiles stay whole: at most two windows of them
    # behind a sink that holds everything older, as in a cache.
    missing = key.shape[2] - query.shape[2]
    padded = missing - config.sink_size if missing >= config.sink_size else missing
    if padded:
        query = F.pad(query, (0, 0, padded, 0))
    numbers = config.sink_size, config.lag_size, softmax.scale, backend
    return _attend(query, key, value, selection.index, softmax.sinks, *numbers)[0][:, :, padded:]


# Operators of their own, so that selective checkpointing can keep the output and compilers see one opaque call.
@torch.library.custom_op("lrsa::tiled", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    sinks: torch.Tensor | None,
    sink_size: int,
    lag_size: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, T, D]` and log-sum-exp `[1, B * H, T, 1]`; the sinks are part of both."""
    rows, states = _flat(query), _states(key, value, index, sink_size)
    exact = torch.promote_types(query.dtype, torch.float32)
    out, lse = _token_major(rows, exact), _token_major(rows[..., :1], exact)
    for tile, before in _plan(rows, key.shape[2], sink_size, lag_size, index.shape[3]):
        tile_out, tile_lse = sdpa.forward(*_take(tile, before, rows, states), tile.causal, scale, backend)
        tile_lse = tile_lse.unsqueeze(-1)
        out_part, lse_part = (_queries(x, tile, before) for x in (out, lse))
        if tile.causal:  # the first of its queries
            out_part.copy_(tile_out)
            lse_part.copy_(tile_lse)
        else:
            merge(out_part, lse_part, tile_out, tile_lse)
    if sinks is not None:
        merge(out, lse, torch.zeros_like(out), sinks.repeat(len(query)).view(1, -1, 1, 1).expand(lse.shape))
    return out.to(query.dtype).reshape(query.shape), lse


@torch.library.custom_op("lrsa::tiled_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sink_size: int,
    lag_size: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value."""
    grad, rows, out, states = _flat(grad), _flat(query), _flat(out), _states(key, value, index, sink_size)
    exact = torch.promote_types(query.dtype, torch.float32)
    grad_rows = _token_major(rows, exact)
    grads = {
        source: [torch.zeros_like(x, dtype=exact, memory_format=torch.contiguous_format) for x in states[source]]
        for source in states
    }
    for tile, before in _plan(rows, key.shape[2], sink_size, lag_size, index.shape[3]):
        grad_part, out_part, lse_part, total = (_queries(x, tile, before) for x in (grad, out, lse, grad_rows))
        taken = _take(tile, before, rows, states)
        grad_query, *grad_states = sdpa.backward(
            grad_part, *taken, out_part, lse_part.squeeze(-1), tile.causal, scale, backend
        )
        if tile.causal:  # the first of its queries
            total.copy_(grad_query)
        else:
            total += grad_query
        for total, part in zip(grads[tile.compact], grad_states, strict=True):
            _add_keys(total, part, tile)
    for total, compact in zip(grads[False], grads[True], strict=True):
        _scatter(total, compact, index, sink_size)
    grad_key, grad_value = (x.to(key.dtype).view(key.shape) for x in grads[False])
    return grad_rows.to(query.dtype).reshape(query.shape), grad_key, grad_value


@_attend.register_fake
def _(query, key, value, *rest):
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = query.new_empty(1, query.shape[0] * query.shape[1], *query.shape[2:])
    return _token_major(rows, query.dtype).reshape(query.shape), _token_major(rows[..., :1], exact)


@_attend_backward.register_fake
def _(grad, query, key, value, *rest):
    rows = query.new_empty(1, query.shape[0] * query.shape[1], *query.shape[2:])
    grad_states = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    return _token_major(rows, query.dtype).reshape(query.shape), *grad_states


def _setup(ctx, inputs, output):
    query, key, value, index, sinks, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, index, *output, sinks)


def _backward(ctx, grad, grad_lse):
    *states, sinks = ctx.saved_tensors
    grads = _attend_backward(grad, *states, *ctx.numbers)
    if sinks is not None:
        out, lse = states[4:]
        sinks = sinks_gradient(sinks, lse.view(out.shape[:3]), grad, out)
    return *grads, None, sinks, *[None] * len(ctx.numbers)


_attend.register_autograd(_backward, setup_context=_setup)


def _plan(rows: torch.Tensor, length: int, sink_size: int, lag_size: int, top_k: int) -> Iterator[tuple[Tile, int]]:
    """The tiles of a row of `length` tokens, and how many of them come before the first query."""
    before = length - rows.shape[2]
    for tile in tiles(length, sink_size, lag_size, top_k, before == 0, *sdpa.sizes(rows)):
        yield tile, before


def _take(tile: Tile, before: int, rows: torch.Tensor, states: dict) -> list[torch.Tensor]:
    """Query, key and value of a tile."""
    return [_queries(rows, tile, before), *(_keys(x, tile) for x in states[tile.compact])]


def _queries(states: torch.Tensor, tile: Tile, before: int) -> torch.Tensor:
    return _blocks(states, tile.query - before, tile.rows, tile.blocks, tile.step)


def _keys(states: torch.Tensor, tile: Tile) -> torch.Tensor:
    return _blocks(states, tile.key, tile.columns, tile.blocks, tile.key_step)


def _add_keys(total: torch.Tensor, part: torch.Tensor, tile: Tile) -> None:
    """Add the gradients of the keys of a tile; overlapping blocks are added part by part."""
    step = min(tile.key_step, tile.columns) if tile.blocks > 1 else tile.columns
    for start in range(0, tile.columns, step):
        tokens = min(step, tile.columns - start)
        place = _blocks(total, tile.key + start, tokens, tile.blocks, tile.key_step)
        place += part[:, :, start : start + tokens]


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


def _states(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, sink_size: int) -> dict:
    """Flat keys and values of the row itself (`False`) and of `[sink | kept]` (`True`)."""
    whole = tuple(_flat(x) for x in (key, value))
    return {False: whole, True: tuple(_compact(x, index, sink_size) for x in whole)}


def _compact(states: torch.Tensor, index: torch.Tensor, sink_size: int) -> torch.Tensor:
    """`[sink | kept]` of flat states: `[1, B * G, C, D]`."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, states.shape[-1])
    return torch.cat([states[:, :, :sink_size], states.gather(2, index)], dim=2)


def _scatter(total: torch.Tensor, compact: torch.Tensor, index: torch.Tensor, sink_size: int) -> None:
    """Add gradients of `[sink | kept]` to those of the row; a kept position occurs once, so the order is no matter."""
    index = index.flatten(2).flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, total.shape[-1])
    total[:, :, :sink_size] += compact[:, :, :sink_size]
    total.scatter_add_(2, index, compact[:, :, sink_size:])
