"""The same rule as a KV cache: a window is cut down to its kept tokens once the window after it is complete.

A layer holds every row from its first real token on, left-aligned in one buffer: `[sink | kept | last windows]`.
Padding is never stored. The layer runs the attention of its new tokens itself, because the rule is *attend first, then
drop*.

Shapes: B batch, H query heads, G KV heads, T new tokens, M tokens held, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from lrsa.attention import rectangles
from lrsa.attention.api import lrsa_attention
from lrsa.attention.documents import find_documents
from lrsa.config import LRSAConfig
from lrsa.selection import select_tokens


class LRSACache(Cache):
    """A compressed KV cache: `model.generate(**inputs, past_key_values=LRSACache(config))`.

    The model must run the attention "lrsa" (`lrsa.apply_lrsa`). Use a new cache for every batch of prompts.

    Args:
        config: the settings that the model was trained with, from its `lrsa_config.json`.

    Source: LagKV, arXiv 2504.04704; LRSA, arXiv 2506.11498.
    """

    def __init__(self, config: LRSAConfig):
        self.config = config
        super().__init__(layer_class_to_replicate=self._new_layer)

    def _new_layer(self) -> LRSALayer:
        return LRSALayer(self.config.for_layer(len(self.layers)))


class LRSALayer(CacheLayerMixin):
    """The cache of one layer.

    Attributes:
        keys, values: buffers `[B, G, capacity, D]`; of row `b` the first `held()[b]` tokens are in use.
        seen: real tokens of each row so far; all else about a row follows from it.
        columns: tokens so far including padding, which is how transformers counts.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, config: LRSAConfig):
        super().__init__()
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = self._announced = False
        self.columns = 0
        self.seen: list[int] = []

    def held(self) -> list[int]:
        """Tokens held of each row."""
        return [self.config.kept_length(seen) for seen in self.seen]

    def _far(self, seen: int) -> int:
        """Length of `[sink | kept]` of a row; to the tokens behind it, all of that is one long sink."""
        return self.config.sink_size + self.config.compressed_windows(seen) * self.config.top_k

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.seen = [0] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Announce new keys and values; `attend`, which the attention "lrsa" calls next, takes them in."""
        if self._announced:
            raise ValueError(
                "LRSACache was given to a model whose attention is not 'lrsa', so nothing would be compressed: "
                "call lrsa.apply_lrsa(model, config) first and start with a new cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(self.seen) != key_states.shape[0]:
            raise ValueError(
                f"this LRSACache holds a batch of {len(self.seen)}, got {key_states.shape[0]} rows: "
                "use a new LRSACache for every batch of prompts."
            )
        self._announced = True
        key_states.lrsa_layer = self
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens over what is held and themselves; then store them and drop what the rule drops.

        Args:
            query: `[B, H, T, D]`; key, value: the new tokens, `[B, G, T, D]`.
            attention_mask: `[B, T]`, nonzero where a new token is real; `None` when all are.
            position_ids: as `lrsa_attention` takes them; used while the cache is empty.

        Returns:
            `[B, H, T, D]`, 0 at padding.
        """
        self._announced = False
        tokens = query.shape[2]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.columns += tokens
        new = [tokens] * len(self.seen) if attention_mask is None else attention_mask.bool().sum(1).tolist()
        if not any(self.seen):
            documents = find_documents(attention_mask, position_ids, (len(new), tokens))
            if sum(group.shape[0] for group in documents) > len(new):
                raise ValueError("an LRSACache row holds one document, got packed rows: give each a row of its own.")
            out = lrsa_attention(
                query, key, value, self.config, scale=scale, position_ids=position_ids, attention_mask=attention_mask
            )
            if attention_mask is not None:
                key, value = (_left_aligned(x, attention_mask) for x in (key, value))
            self.keys, self.values = _compress(key, value, new, self.config)
            self.seen = new
            return out
        if tokens == 1:
            return self._decode(query, key, value, new, scale)
        return self._extend(query, key, value, attention_mask, new, scale)

    def _decode(self, query, key, value, new: list[int], scale: float) -> torch.Tensor:
        """One token per row: write it behind what the row holds, attend, and drop in rows whose windows are full."""
        batch, heads, _, channels = query.shape
        device = key.device
        held = self.held()
        self._reserve(max(held) + 1)
        rows = torch.tensor([row for row, count in enumerate(new) if count], device=device)
        ends = torch.tensor([held[row] for row, count in enumerate(new) if count], device=device)
        self.keys[rows, :, ends], self.values[rows, :, ends] = key[rows, :, 0], value[rows, :, 0]
        held = [length + count for length, count in zip(held, new, strict=True)]
        mask = None
        if min(held) < max(held):
            mask = torch.arange(max(held), device=device) < torch.tensor(held, device=device)[:, None]
            mask = mask[:, None, None]
        # The query heads of a KV head are the rows of one small attention, so that its keys are read once.
        out = F.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, channels),
            self.keys[:, :, : max(held)],
            self.values[:, :, : max(held)],
            attn_mask=mask,
            scale=scale,
        ).reshape(batch, heads, 1, channels)
        if not all(new):
            out = out.masked_fill(torch.tensor(new, device=device)[:, None, None, None] == 0, 0.0)
        before, self.seen = self.seen, [seen + count for seen, count in zip(self.seen, new, strict=True)]
        count = self.config.compressed_windows
        self._drop([row for row, seen in enumerate(self.seen) if count(seen) > count(before[row])], before)
        return out

    def _drop(self, rows: list[int], before: list[int]) -> None:
        """In rows that hold two full windows, cut the first down to its kept tokens and close the gap, in place."""
        if not rows:
            return
        lag, device = self.config.lag_size, self.keys.device
        far = torch.tensor([self._far(before[row]) for row in rows], device=device)[:, None, None]
        row = torch.tensor(rows, device=device)[:, None, None]
        head = torch.arange(self.keys.shape[1], device=device)[None, :, None]
        window = torch.arange(2 * lag, device=device)
        near = [buffer[row, head, far + window] for buffer in (self.keys, self.values)]
        kept = select_tokens(*near, self.config.replace(sink_size=0)).index.flatten(2)
        stays = torch.cat([kept, window[lag:].expand(*kept.shape[:2], -1)], dim=2)
        place = far + torch.arange(stays.shape[2], device=device)
        for buffer, states in zip((self.keys, self.values), near, strict=True):
            buffer[row, head, place] = states.gather(2, stays.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))

    def _extend(self, query, key, value, attention_mask, new: list[int], scale: float) -> torch.Tensor:
        """Several tokens per row over a filled cache: rows of one length together, each group like a fresh row."""
        held = self.held()
        out = torch.zeros_like(query)
        parts: list[tuple[torch.Tensor, torch.Tensor]] = [None] * len(new)
        for state in sorted(set(zip(self.seen, new, strict=True))):
            rows = [row for row, found in enumerate(zip(self.seen, new, strict=True)) if found == state]
            length = held[rows[0]]
            at = torch.tensor(rows, device=key.device)
            fresh = [x[at] for x in (query, key, value)]
            if attention_mask is not None:
                fresh = [_left_aligned(x, attention_mask[at])[:, :, : state[1]] for x in fresh]
            keys, values = (
                torch.cat([buffer[at, :, :length], x], dim=2)
                for buffer, x in zip((self.keys, self.values), fresh[1:], strict=True)
            )
            config = self.config.replace(sink_size=self._far(state[0]))
            if state[1]:
                found = rectangles.attend(fresh[0], keys, values, config, scale)
                if attention_mask is None:
                    out[at] = found
                else:
                    column = attention_mask[at].bool().nonzero()[:, 1].view(len(rows), -1)
                    out[at[:, None], :, column] = found.transpose(1, 2)
            keys, values = _compress(keys, values, [length + state[1]] * len(rows), config)
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

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("LRSACache cannot be cropped, because dropped tokens are gone: start with a new LRSACache.")

    def offload(self) -> None:
        raise ValueError("LRSACache cannot be offloaded: use it without offloading; it is small by design.")


def _left_aligned(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the real tokens of `[B, G, T, D]` to the front of their row, in order."""
    order = (~attention_mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)
    return states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _compress(keys, values, lengths: list[int], config: LRSAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What remains of rows of `lengths` tokens, left-aligned, once every window with a complete successor is cut."""
    length = max(lengths)
    keys, values = keys[:, :, :length], values[:, :, :length]
    counts = [config.compressed_windows(n) for n in lengths]
    if not any(counts):
        return keys.clone(), values.clone()
    device = keys.device
    position = torch.arange(length, device=device)
    near = config.sink_size + config.lag_size * torch.tensor(counts, device=device)[:, None]
    stays = ((position < config.sink_size) | (position >= near))[:, None].repeat(1, keys.shape[1], 1)
    index = select_tokens(keys, values, config).index.flatten(2)
    stays |= torch.zeros_like(stays).scatter_(2, index, True)
    stays &= (position < torch.tensor(lengths, device=device)[:, None])[:, None]
    held = max(config.kept_length(n) for n in lengths)
    order = (~stays).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :held, None]
    return tuple(x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
