"""What the cache layers share: rows of different lengths in one buffer, and the attention over them.

A layer holds every row from its first real token on, left-aligned; padding is never stored. The layer runs the
attention of its new tokens itself, because the rule is *attend first, then drop*.

Shapes: B batch, H query heads, G KV heads, T new tokens, S tokens, D head dim.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers.cache_utils import CacheLayerMixin

from lrsa.attention.documents import find_documents
from lrsa.attention.softmax import Softmax


class RowsLayer(CacheLayerMixin):
    """The cache of one layer; `CompressedLayer` and `SlidingLayer` say what stays of a row, and where it lies.

    Attributes:
        keys, values: buffers `[B, G, capacity, D]`; of row `b` the first `held()[b]` tokens are in use.
        seen: real tokens of each row so far; all else about a row follows from it.
        columns: tokens so far including padding, which is how transformers counts.
        next: position of each row's next token, `[B]`, 0 before its first; in the layer that follows positions.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self._before: RowsLayer | None = None  # as it was before the last tokens, if other layers attend to them too
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = 0
        self.seen: list[int] = []
        self.next: torch.Tensor | None = None

    @abstractmethod
    def length(self, seen: int) -> int:
        """Tokens held of a row of `seen` tokens."""

    def held(self) -> list[int]:
        """Tokens held of each row."""
        return [self.length(seen) for seen in self.seen]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        impl: str = "auto",
        shared: bool = False,
        follow: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens over what is held and themselves; then store them and drop what the rule drops.

        Args:
            query: `[B, H, T, D]`; key, value: the new tokens, `[B, G, T, D]`.
            attention_mask: `[B, T]`, nonzero where a new token is real; `None` when all are.
            position_ids: as `lrsa_attention` takes them; used while the cache is empty.
            scale, softcap, sinks, impl: as `lrsa_attention` takes them; a single new token is always one small dense
                attention.
            shared: other layers will call `attend_again`.
            follow: positions, `[B or 1, T]`, that must go on where those given before ended.

        Returns:
            `[B, H, T, Dv]`, 0 at padding.

        Raises:
            ValueError: when the rows are others, positions jump, or a row holds several documents.
        """
        if self.is_initialized and len(self.seen) != query.shape[0]:
            raise ValueError(
                f"this LRSACache holds a batch of {len(self.seen)}, got {query.shape[0]} rows: "
                "use a new LRSACache for every batch of prompts."
            )
        if follow is not None:
            self._follow(follow.expand(len(query), -1), attention_mask)
        self._before = None  # not part of the copy: each would hold the one before it
        if shared:
            self._before = copy.copy(self)
        tokens = query.shape[2]
        softmax = Softmax.of(query, scale, softcap, sinks)
        new = [tokens] * len(query) if attention_mask is None else attention_mask.bool().sum(1).tolist()
        if not any(self.seen):
            out = self._first(query, key, value, attention_mask, position_ids, new, softmax, impl)
        elif tokens == 1:
            out = self._decode(query, key, value, new, softmax)
        else:
            _refuse_packing(attention_mask, position_ids, new, tokens)
            out = self._extend(query, key, value, attention_mask, new, softmax, impl)
        self.columns += tokens
        return out

    def attend_again(self, *args, **kwargs) -> torch.Tensor:
        """`attend` of other queries over the same tokens, which were stored already: nothing of the layer changes."""
        reader = copy.copy(self._before)
        reader._drop = lambda before: None
        return reader.attend(*args, **kwargs)

    def _follow(self, position: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Check the positions of the new tokens against those before, and note where they end."""
        real = torch.ones_like(position, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        last = torch.where(real, position, -1).amax(1) + 1
        if any(self.seen) and self.next is not None:
            first = position.gather(1, real.int().argmax(1, keepdim=True))
            expected = torch.where(self.next[:, None] > 0, self.next[:, None], first) + real.cumsum(1) - 1
            jumps = real & (position != expected)
            if jumps.any():
                row, column = jumps.nonzero()[0].tolist()
                raise ValueError(
                    f"position_ids jump: row {row} of this LRSACache goes on at {int(expected[row, column])}, got "
                    f"{int(position[row, column])}. Positions count the real tokens of one document: generate does so, "
                    "with padding on the left and an attention_mask over all tokens. For another prompt use a new "
                    "LRSACache."
                )
            last = torch.where(real.any(1), last, self.next)
        self.next = last

    def _first(self, query, key, value, attention_mask, position_ids, new: list[int], softmax, impl) -> torch.Tensor:
        """The first tokens of every row."""
        _refuse_packing(attention_mask, position_ids, new, query.shape[2])
        options = vars(softmax) | {"position_ids": position_ids, "attention_mask": attention_mask}
        out = self._attend_whole(query, key, value, impl, **options)
        if attention_mask is not None:
            key, value = (_left_aligned(x, attention_mask) for x in (key, value))
        self.keys, self.values = self._remains(key, value, new)
        self.seen, self.is_initialized = new, True
        return out

    def _decode(self, query, key, value, new: list[int], softmax: Softmax) -> torch.Tensor:
        """One token per row: write it into the row's next place, attend, and drop in rows whose windows are full."""
        batch, heads, _, channels = query.shape
        places = [self._place(seen) for seen in self.seen]
        self._reserve(max(places) + 1)
        if all(new) and min(places) == max(places):
            self.keys[:, :, places[0]], self.values[:, :, places[0]] = key[:, :, 0], value[:, :, 0]
        else:
            rows = on_device((row for row, count in enumerate(new) if count), key.device)
            ends = on_device((places[row] for row, count in enumerate(new) if count), key.device)
            self.keys[rows, :, ends], self.values[rows, :, ends] = key[rows, :, 0], value[rows, :, 0]
        state = zip(self.held(), places, new, strict=True)
        held = [max(length, place + 1) if count else length for length, place, count in state]
        mask = None
        if min(held) < max(held):
            mask = _first_of(tuple(held), key.device, torch.is_inference_mode_enabled())
        keys, values = self._expanded(self.keys[:, :, : max(held)], self.values[:, :, : max(held)])
        if softmax.is_plain:  # the query heads of a KV head are the rows of one small attention: its keys are read once
            query = query.reshape(batch, keys.shape[1], -1, channels)
            out = F.scaled_dot_product_attention(query, keys, values, mask, scale=softmax.scale)
            out = out.reshape(batch, heads, 1, -1)
        else:
            out = softmax.attend(query, keys, values, mask)
        if not all(new):
            out = out.masked_fill(on_device(new, key.device)[:, None, None, None] == 0, 0.0)
        before, self.seen = self.seen, [seen + count for seen, count in zip(self.seen, new, strict=True)]
        if self._before is not None:  # what is dropped in place now must be there for other layers
            drops = sum(self.held()) < sum(held)
            self._before.keys, self._before.values = (x.clone() if drops else x for x in (self.keys, self.values))
        self._drop(before)
        return out

    def _expanded(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that queries attend to, of those that are held."""
        return keys, values

    def _extend(self, query, key, value, attention_mask, new: list[int], softmax: Softmax, impl: str) -> torch.Tensor:
        """Several tokens per row over a filled cache: rows of one length together, each group like a fresh row."""
        out = query.new_zeros(*query.shape[:3], self._expanded(key[:, :, :1], value[:, :, :1])[1].shape[3])
        parts: list[tuple[torch.Tensor, torch.Tensor]] = [None] * len(new)
        for state in sorted(set(zip(self.seen, new, strict=True))):
            rows = [row for row, pair in enumerate(zip(self.seen, new, strict=True)) if pair == state]
            seen, count = state
            at = on_device(rows, key.device)
            fresh = [x[at] for x in (query, key, value)]
            if attention_mask is not None:
                fresh = [_left_aligned(x, attention_mask[at])[:, :, :count] for x in fresh]
            keys, values = (
                torch.cat([self._in_order(buffer[at], seen), x], dim=2)
                for buffer, x in zip((self.keys, self.values), fresh[1:], strict=True)
            )
            if count:
                part = self._attend_behind(fresh[0], keys, values, seen, softmax, impl)
                if attention_mask is None:
                    out[at] = part
                else:
                    column = attention_mask[at].bool().nonzero()[:, 1].view(len(rows), -1)
                    out[at[:, None], :, column] = part.transpose(1, 2)
            keys, values = self._remains(keys, values, [keys.shape[2]] * len(rows), seen)
            for place, row in enumerate(rows):
                parts[row] = (keys[place], values[place])
        self.keys, self.values = (
            torch.nn.utils.rnn.pad_sequence([x.transpose(0, 1) for x in states], batch_first=True).transpose(1, 2)
            for states in zip(*parts, strict=True)
        )
        self.seen = [seen + count for seen, count in zip(self.seen, new, strict=True)]
        return out

    def _reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens; the slack of 1/32 makes growing cheap on average."""
        missing = length - self.keys.shape[2]
        if missing > 0:
            missing += max(64, length // 32)
            self.keys, self.values = (F.pad(x, (0, 0, 0, missing)) for x in (self.keys, self.values))

    def update(self, *args, **kwargs):
        raise ValueError("a layer of an LRSACache is filled through the cache: call LRSACache.update.")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the first tokens bring the buffers."""

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: where the next token's column is."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = max(self.held(), default=0)
        return held + query_length, self.columns - held

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))
            self.seen = [self.seen[index] for index in indices.tolist()]
            self.next = None if self.next is None else self.next[indices.to(self.next.device)]

    def append_rows(self, other: RowsLayer) -> None:
        """Take in the rows of another layer of the same kind, behind the own ones."""
        length = max(self.keys.shape[2], other.keys.shape[2])
        self.keys, self.values = (
            torch.cat([F.pad(x, (0, 0, 0, length - x.shape[2])) for x in pair])
            for pair in ((self.keys, other.keys), (self.values, other.values))
        )
        self.seen = [*self.seen, *other.seen]
        self.next = None if self.next is None or other.next is None else torch.cat([self.next, other.next])
        self.columns = max(self.columns, other.columns)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def offload(self) -> None:
        raise ValueError("LRSACache cannot be offloaded: use it without offloading; it is small by design.")


def on_device(numbers: Iterable[int], device: torch.device) -> torch.Tensor:
    """Whole numbers as int64 `[N]`, not to be written to. All layers of a step ask for the same: the first copies."""
    return _copied(tuple(numbers), device, torch.is_inference_mode_enabled())


@functools.lru_cache(maxsize=32)
def _copied(numbers: tuple[int, ...], device: torch.device, inference: bool) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)  # what inference mode makes is of no use to autograd


@functools.lru_cache(maxsize=4)
def _first_of(held: tuple[int, ...], device: torch.device, inference: bool) -> torch.Tensor:
    """Mask `[B, 1, 1, longest]` of the first `held[b]` places of every row."""
    return (torch.arange(max(held), device=device) < on_device(held, device)[:, None])[:, None, None]


def _refuse_packing(attention_mask, position_ids, new: list[int], tokens: int) -> None:
    documents = find_documents(attention_mask, position_ids, (len(new), tokens))
    if sum(group.shape[0] for group in documents) > len(new):
        raise ValueError("an LRSACache row holds one document, got packed rows: give each a row of its own.")


def _left_aligned(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the real tokens of `[B, G, T, D]` to the front of their row, in order."""
    order = (~attention_mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
