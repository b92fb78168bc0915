"""The mask function that transformers calls once per forward: what an attention has to know of padding and documents.

Shapes: B batch, T new tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from lrsa.hf.latent import hand_latents_on
from lrsa.hf.layers import NAME
from lrsa.hf.support import check_named


def lrsa_mask(
    *args,
    batch_size: int | None = None,
    q_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """What is known of the new tokens: bool padding `[B, T]`, int32 positions in packed documents `[B, 1, T, 1]`, or
    `None`.

    Models whose layers share keys get the padding in four dimensions too. Causality and sliding windows are the
    attention's own affair; any other pattern is refused.

    Raises:
        ValueError: when a token would see later ones, as those of an image do, or the model has a pattern of its own.
    """
    if config is not None:
        hand_latents_on(type(config))
    if use_vmap and not _shows_in_neighbours(mask_function):
        raise ValueError(
            "lrsa does not support this model: it adds its own pattern to the causal mask. Use lrsa.remove_lrsa(model)."
        )
    if config is not None and not hasattr(config, NAME):
        check_named(config)
    batch_size = args[0] if batch_size is None else batch_size
    q_length = args[1] if q_length is None else q_length
    positions = None
    plain = (causal_mask_function, bidirectional_mask_function)  # the latter for attention across inputs
    if mask_function not in plain and q_length > 1:
        kind = getattr(config, "model_type", "unknown")
        positions = _positions(mask_function, batch_size, q_length, device, kind)
    if attention_mask is None:
        found = positions
    else:
        padding = attention_mask[:, -q_length:].bool()
        found = None if padding.all() else padding
    if found is None:
        return None
    # Layers that share keys slice their mask by queries, the third dimension of what other attentions take. Positions
    # may come here again (a model for images hands them to its language model), and would count as padding in two.
    in_four = found is positions or getattr(config, "num_kv_shared_layers", 0)
    return found[:, None, :, None] if in_four else found


def _shows_in_neighbours(mask_function: Callable) -> bool:
    """Whether a pattern is causal but for documents and blocks (images), which show in what neighbours see."""
    inner = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for value in inner for part in (value if isinstance(value, tuple) else (value,)) if callable(part)]
    known = ("causal_mask_function", "sliding_window_overlay", "blockwise_overlay", "packed_sequence_mask_function")
    return all(map(_shows_in_neighbours, parts)) if parts else mask_function.__qualname__.split(".")[0] in known


def _positions(mask_function: Callable, batch: int, length: int, device, kind: str) -> torch.Tensor | None:
    """Positions in packed documents, read from which neighbours see each other; `None` for one document a row."""
    row, first = torch.arange(batch, device=device)[:, None], torch.zeros(1, dtype=torch.long, device=device)
    place = torch.arange(length, device=device)
    if torch.as_tensor(mask_function(row, first, place[None, :-1], place[None, 1:])).any():
        raise ValueError(
            f"lrsa does not support an image for this model ({kind}), or whatever else it is given whose tokens see "
            "later ones: it adds its own pattern to the causal mask. Give it text, or use lrsa.remove_lrsa(model)."
        )
    together = torch.as_tensor(mask_function(row, first, place[None, 1:], place[None, :-1])).expand(batch, length - 1)
    if together.all():
        return None
    begins = torch.cat([torch.zeros(batch, 1, dtype=torch.bool, device=device), ~together], 1)
    return (place - torch.where(begins, place, 0).cummax(1).values).int()


AttentionMaskInterface.register(NAME, lrsa_mask)
