"""The public attention function: checks, and the choice of implementation.

Shapes: B batch, H query heads, G KV heads, T tokens of a row, D head dim.
"""

from __future__ import annotations

import functools
import logging

import torch

from lrsa.attention import flex, reference
from lrsa.attention.cpu import build as compiler
from lrsa.attention.cpu import kernel as native
from lrsa.attention.documents import attend_documents
from lrsa.attention.tiled import attention as rectangles
from lrsa.config import LRSAConfig

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "native": native.attend,
    "rectangles": rectangles.attend,
    "cudnn": functools.partial(rectangles.attend, vendor="cudnn"),
    "flex": flex.attend,
}


def lrsa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: LRSAConfig,
    *,
    scale: float | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Lag-Relative Sparse Attention over whole rows, in training or in the prefill of an empty cache.

    Args:
        query: `[B, H, T, D]`, after RoPE; key, value: `[B, G, T, D]` with `H % G == 0`.
        config: the settings.
        scale: factor of the scores before the softmax, `D ** -0.5` when `None`.
        position_ids: `[B, T]` or `[1, T]`; a row is cut into documents where they restart, as packing does.
        attention_mask: the 2D padding mask `[B, T]`, nonzero where a token is real; padding on any side.
        impl: `"reference"` (dense mask, for tests), `"native"` (compiled, CPU), `"rectangles"` (pieces for PyTorch's
            flash kernels, any device), or `"auto"`, which logs once what it chose. Not yet run on a GPU and chosen by
            name only: `"cudnn"` (the same pieces for cuDNN) and `"flex"` (FlexAttention; on a CPU without gradients).

    Returns:
        `[B, H, T, D]` in the query's dtype; 0 at padding. Gradients flow to query, key and value.

    Raises:
        ValueError: when shapes, dtypes, devices or `impl` cannot be used.

    Source: LRSA, arXiv 2506.11498.
    """
    _check(query, key, value, position_ids, attention_mask, impl)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend = functools.partial(attend_rows, config=config, scale=scale, impl=impl)
    return attend_documents(attend, query, key, value, attention_mask, position_ids)


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: LRSAConfig, scale: float, impl: str = "auto"
) -> torch.Tensor:
    """`lrsa_attention` over rows without padding, unchecked; the queries are the last `T` of the `S` tokens of a row.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, S, D]`, with `T <= S`.

    Returns:
        `[B, H, T, D]` in the query's dtype.
    """
    if impl == "auto":
        impl = choose(query.device.type, query.dtype)
    return IMPLEMENTATIONS[impl](query, key, value, config, scale)


@functools.cache
def choose(device: str, dtype: torch.dtype) -> str:
    """The implementation that `"auto"` takes on this kind of device in this dtype, by benchmarks/attention.py."""
    if device != "cpu":
        logger.info("lrsa_attention uses 'rectangles' on %s in %s: large calls of vendors' kernels", device, dtype)
        return "rectangles"
    try:
        native.library(dtype)
    except (compiler.CompilerError, OSError) as error:
        logger.warning("lrsa_attention uses 'rectangles', because 'native', which is faster, cannot be used: %s", error)
        return "rectangles"
    logger.info("lrsa_attention uses 'native' on a CPU in %s: compiled, and it computes no hidden pair", dtype)
    return "native"


def _check(query, key, value, position_ids, attention_mask, impl):
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}.")
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must be [batch, heads, tokens, head_dim], got {query.dim()}D and {key.dim()}D."
        )
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}.")
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"query, key and value must have one dtype and be on one device, got {found}: convert them.")
    batch, heads, tokens, channels = query.shape
    if (batch, tokens, channels) != (key.shape[0], key.shape[2], key.shape[3]):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch, tokens and head_dim; "
            "a query shorter than its keys belongs to an LRSACache."
        )
    if heads % key.shape[1]:
        raise ValueError(f"query heads ({heads}) must be a multiple of KV heads ({key.shape[1]}).")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, tokens):
        raise ValueError(
            f"attention_mask must be the 2D padding mask [{batch}, {tokens}], got {tuple(attention_mask.shape)}."
        )
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"position_ids must be [{batch}, {tokens}] or [1, {tokens}], got {tuple(position_ids.shape)}.")
