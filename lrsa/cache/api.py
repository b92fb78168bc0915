"""The cache that transformers is given: one layer of the right kind for every layer of the model.

transformers hands a cache the new keys and values before the attention runs. So `update` only announces them, and the
attention "lrsa", which has the queries too, calls `attend`: once, for the layer that was announced.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer

from lrsa.cache.compressed import CompressedLayer
from lrsa.cache.latent import LatentLayer
from lrsa.cache.rows import RowsLayer
from lrsa.cache.sliding import SlidingLayer
from lrsa.config import LRSAConfig

_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _ARGUMENTS else "past_key_values"
"""What a model and `generate` call their cache: `past_key_values`, since transformers 5.24 `cache`.

Until transformers 6 `generate` takes the old name as well and warns.
"""


class LRSACache(Cache):
    """A compressed KV cache: `model.generate(**inputs, past_key_values=LRSACache(config))`.

    The model must run the attention "lrsa" (`lrsa.apply_lrsa`). Use a new cache for every batch of prompts; a
    conversation goes on over its own: pass all of it, beginning with the very tokens that the cache has seen. Layers
    with a sliding window keep their window instead.

    Args:
        config: the settings that the model was trained with, from its `lrsa_config.json`.
        prefill: what the tokens of a prompt see. `"sparse"` is what the model met in training under LRSA: the same
            tokens however the prompt is cut. `"dense"` is for models that were not trained so, as in LagKV: all of
            what is held and all earlier tokens of the same forward, which are dropped behind it; then
            `prefill_chunk_size` of `generate` changes the result. Decoding is the same in both.

    Source: LagKV, arXiv 2504.04704; LRSA, arXiv 2506.11498.
    """

    is_croppable = False

    def __init__(self, config: LRSAConfig, prefill: Literal["sparse", "dense"] = "sparse"):
        if prefill not in ("sparse", "dense"):
            raise ValueError(f"prefill must be 'sparse' or 'dense', got {prefill!r}.")
        self.config, self.prefill = config, prefill
        super().__init__(layers=[])
        self._begin()

    def _begin(self) -> None:
        self._announced: int | None = None  # the layer whose tokens wait for their attention
        self.ids: torch.Tensor | None = None  # the tokens seen, `[B, tokens]`, as far as `generate` has told them
        self.is_reordered = False  # by beam search

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Announce new keys and values; `attend`, which the attention "lrsa" calls next, takes them in."""
        if self._announced is not None and layer_idx <= self._announced:
            raise ValueError(
                f"the forward before over this LRSACache was broken off in layer {self._announced}: start with a new "
                "LRSACache. Without an error before, the model's attention is not 'lrsa': call "
                "lrsa.apply_lrsa(model, config) first."
            )
        if self._announced is not None:
            raise ValueError(
                "LRSACache was given to a model whose attention is not 'lrsa', so nothing would be compressed: call "
                "lrsa.apply_lrsa(model, config) first and start with a new cache; for a model that was not trained "
                "under LRSA, LRSACache(config, prefill='dense')."
            )
        self._announced = layer_idx
        key_states.lrsa_cache = self
        return key_states, value_states

    def attend(self, layer_idx: int, window: int | None, *args, **kwargs) -> torch.Tensor:
        """Attention of a layer's new tokens, which are then stored: see `RowsLayer.attend`.

        Args:
            layer_idx: index of the layer; window: its sliding window in tokens, `None` if it attends to everything.
        """
        if layer_idx != self._announced:
            announced = "none" if self._announced is None else f"those of layer {self._announced}"
            self._announced = None
            raise ValueError(
                f"LRSACache does not support this model: layer {layer_idx} attends to new tokens, but {announced} were "
                "announced to the cache (its attention runs twice per layer, or it has a cache index of its own): call "
                "lrsa.remove_lrsa(model) and use the model's own cache."
            )
        self._announced = None
        if layer_idx >= len(self.layers):
            self._put(layer_idx, self._new_layer(layer_idx, window, "expand" in kwargs))
        layer, first = self.layers[layer_idx], self._first()
        if layer is not first and layer.columns + args[0].shape[2] != first.columns:
            raise ValueError(
                f"layer {layer_idx} of this LRSACache has seen {layer.columns} tokens and the layers before it "
                f"{first.columns}: a forward over it was broken off. Start with a new LRSACache."
            )
        return layer.attend(*args, **kwargs)

    def _first(self) -> RowsLayer | None:
        return next((layer for layer in self.layers if isinstance(layer, RowsLayer)), None)

    def attend_again(self, layer_idx: int, window: int | None, *args, **kwargs) -> torch.Tensor:
        """Attention of a layer that has no keys of its own, over those that layer `layer_idx` has just stored."""
        return self.layers[layer_idx].attend_again(*args, **kwargs)

    def _new_layer(self, layer_idx: int, window: int | None, is_latent: bool) -> RowsLayer:
        kind = LatentLayer if is_latent else CompressedLayer
        return SlidingLayer(window) if window else kind(self.config.for_layer(layer_idx), self.prefill)

    def reset(self) -> None:
        self._begin()
        super().reset()

    def activate_past_recording(self) -> None:
        raise ValueError(
            "assisted decoding takes tokens back, and an LRSACache has dropped what they displaced: call generate "
            "without assistant_model, assistant_early_exit, prompt_lookup_num_tokens and use_mtp."
        )

    def rows(self, indices: Sequence[int]) -> LRSACache:
        """A cache that holds copies of some rows of this one."""
        part = copy.copy(self)
        part.layers = [copy.copy(layer) for layer in self.layers]
        part.batch_select_indices(torch.tensor(indices))
        return part

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.ids = None
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.ids = None
        super().reorder_cache(beam_idx)

    def append_rows(self, other: LRSACache) -> None:
        """Take in the rows of another cache, behind the own ones.

        Rows are independent of each other, so those of one batch may have seen any number of tokens. Give the model
        `position_ids` then, each row's own: it would count from the longest.
        """
        self.ids = None
        for layer, more in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, LinearAttentionLayer):
                raise ValueError("rows of caches with recurrent states cannot be put together: use a cache for each.")
            if isinstance(layer, RowsLayer):
                layer.append_rows(more)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("LRSACache cannot be cropped, because dropped tokens are gone: start with a new LRSACache.")

    def _put(self, layer_idx: int, layer) -> None:
        """Add a layer as the model reaches it; those before it that hold nothing (experts, mlp) are left empty."""
        self.layers += [DummyLayer() for _ in range(layer_idx - len(self.layers))]
        self.layers.append(layer)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """State of a convolution or recurrent layer, which is kept as transformers keeps it."""
        if layer_idx >= len(self.layers):
            self._put(layer_idx, LinearAttentionLayer())
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        if layer_idx >= len(self.layers):
            self._put(layer_idx, LinearAttentionLayer())
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
        if layer_idx >= len(self.layers):
            self._put(layer_idx, LinearAttentionLayer())
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
        if layer_idx >= len(self.layers):
            self._put(layer_idx, LinearAttentionLayer())
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def update_indexer(self, *args, **kwargs):
        raise ValueError(
            "LRSACache holds keys, values and recurrent states, and this model has layers with an indexer: use the "
            "model's own cache."
        )
