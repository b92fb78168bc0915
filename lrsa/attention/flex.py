"""Sparse attention by PyTorch's FlexAttention, over `[sink | kept | row]` under a mask that depends on lengths only.

No merging and one kernel, compiled anew for every length, number of rows and dtype: for rows of few lengths (PyTorch
stops at 8 and says so; `torch._dynamo.config.recompile_limit` is that number), on a GPU. Blocks of 128
queries and 128 keys that hold no visible pair are skipped; which these are is computed from their numbers, because a
dense mask of 128k x 160k would not fit.

Shapes: B batch, H query heads, G KV heads, T tokens, D head dim; Q blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lrsa.attention.softmax import Softmax
from lrsa.config import LRSAConfig
from lrsa.selection import Selection

BLOCK = 128


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
    config: LRSAConfig,
    softmax: Softmax,
) -> torch.Tensor:
    """`lrsa.attention.reference.attend` over whole rows; on a CPU without gradients only, uncompiled, for tests.

    Raises:
        ValueError: when there are fewer queries than keys, or gradients are needed on a CPU.
    """
    length = key.shape[2]
    if query.shape[2] != length:
        raise ValueError(f"impl='flex' takes whole rows, got {query.shape[2]} queries of {length}: use impl='auto'.")
    layout = Layout(config.sink_size, config.lag_size, config.top_k, length)
    states = [layout.keys(x, selection.gather(x)) for x in (key, value)]
    on_cpu = query.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("impl='flex' has no gradients on a CPU: use impl='auto', or torch.no_grad().")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # on a CPU it is for tests
        out = (flex_attention if on_cpu else _compiled())(
            layout.queries(query),
            *states,
            block_mask=layout.mask(query.device),
            score_mod=_capped(softmax.softcap),
            scale=softmax.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if softmax.sinks is None else AuxRequest(lse=True),
        )
    if softmax.sinks is not None:
        out, lse = out[0], out[1].lse
        out = (out * torch.sigmoid(lse - softmax.sinks[:, None]).unsqueeze(-1)).to(query.dtype)
    sink, body = config.sink_size, layout.sink
    return torch.cat([out[:, :, :sink], out[:, :, body : body + length - sink]], dim=2)


@functools.cache  # another function would be compiled anew
def _capped(softcap: float | None) -> Callable | None:
    return None if softcap is None else lambda score, *place: softcap * torch.tanh(score / softcap)


@functools.cache
def _compiled():
    # In one graph: else, past the limit of compilations, PyTorch would go on with scores of T x T.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class Layout:
    """Where sink, kept tokens and the row lie, each padded to whole blocks, so that windows begin where blocks do.

    Queries are `[sink | row]`, keys `[sink | kept | row]`; the row is what comes behind the sink.
    """

    sink_size: int
    lag_size: int
    top_k: int
    length: int

    @property
    def sink(self) -> int:
        return _count(self.sink_size) * BLOCK

    @property
    def kept(self) -> int:
        return _count(self._kept_tokens) * BLOCK

    @property
    def row(self) -> int:
        return _count(self.length - self.sink_size) * BLOCK

    @property
    def _kept_tokens(self) -> int:
        return max((self.length - self.sink_size) // self.lag_size - 1, 0) * self.top_k

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, T, D]` -> `[B, H, sink + row, D]`."""
        return torch.cat([_padded(states[:, :, : self.sink_size], self.sink), self._row(states)], dim=2)

    def keys(self, states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """`[B, G, T, D]` and the kept ones of them -> `[B, G, sink + kept + row, D]`."""
        sink = _padded(states[:, :, : self.sink_size], self.sink)
        return torch.cat([sink, _padded(kept, self.kept), self._row(states)], dim=2)

    def _row(self, states: torch.Tensor) -> torch.Tensor:
        return _padded(states[:, :, self.sink_size :], self.row)

    def rule(self) -> Callable:
        """The rule of `lrsa.visibility` for places in queries and keys, as FlexAttention asks for it."""
        sink_size, lag_size, top_k = self.sink_size, self.lag_size, self.top_k
        sink, body = self.sink, self.sink + self.kept

        def visible(batch, head, query, key):
            row, kept, column = query - sink, key - sink, key - body
            window = row // lag_size
            in_sink = (key < sink_size) & ((row >= 0) | (key <= query))
            # What lies behind the kept tokens would be of windows that no query is two windows behind.
            in_kept = (row >= 0) & (kept >= 0) & (kept // top_k <= window - 2)
            in_row = (row >= 0) & (column >= 0) & (column <= row) & (window - column // lag_size <= 1)
            return in_sink | in_kept | in_row

        return visible

    @functools.lru_cache(maxsize=8)  # noqa: B019  a layout is a few numbers
    @torch.inference_mode(False)  # what is kept may be used in training later
    def mask(self, device: torch.device) -> BlockMask:
        """Which blocks hold a visible pair, and which of them nothing else."""
        some, every = self.blocks()
        partial = some & ~every
        counts, indices = zip(*(_ordered(x, device) for x in (partial, every)), strict=True)
        return BlockMask.from_kv_blocks(
            counts[0],
            indices[0],
            counts[1],
            indices[1],
            BLOCK_SIZE=BLOCK,
            mask_mod=self.rule(),
            seq_lengths=(self.sink + self.row, self.sink + self.kept + self.row),
        )

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool `[Q, C]` twice: blocks with a visible pair, and blocks in which every pair is visible."""
        query = torch.arange(0, self.sink + self.row, BLOCK)[:, None]
        key = torch.arange(0, self.sink + self.kept + self.row, BLOCK)
        is_row = query >= self.sink
        row, column, kept = query - self.sink, key - self.sink - self.kept, key - self.sink
        last_row, last_column, last_kept = row + BLOCK - 1, column + BLOCK - 1, kept + BLOCK - 1
        in_sink, in_kept, in_row = key < self.sink, (kept >= 0) & (column < 0), column >= 0
        lag = self.lag_size
        some = (in_sink & (is_row | (key <= query))) | (
            is_row
            & (
                (in_kept & (kept // self.top_k <= last_row // lag - 2))
                | (in_row & (column <= last_row) & (row // lag - last_column // lag <= 1))
            )
        )
        every = is_row & (
            (in_sink & (key + BLOCK <= self.sink_size))
            | (in_kept & (last_kept // self.top_k <= row // lag - 2))
            | (in_row & (last_column <= row) & (last_row // lag - column // lag <= 1))
        )
        return some, every


def _count(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(states, (0, 0, 0, length - states.shape[2]))


def _ordered(blocks: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of blocks for every block of queries `[1, 1, Q]`, and their indices first `[1, 1, Q, C]`."""
    order = blocks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    # All of one width: torch 2.11 reads the indices of full blocks with the strides of the others.
    return tuple(x.to(torch.int32)[None, None].contiguous().to(device) for x in (blocks.sum(1), order))
