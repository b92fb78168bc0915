"""The public attention function: checks, and the choice of implementation.

Shapes: B batch, H query heads, G KV heads, T tokens of a row, D head dim.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F

from lrsa.attention import flex, reference, sliding
from lrsa.attention.cpu import build, kernel
from lrsa.attention.documents import attend_documents
from lrsa.attention.softmax import Softmax
from lrsa.attention.tiled import attention as tiled
from lrsa.attention.tiled import sdpa
from lrsa.config import LRSAConfig
from lrsa.latent import Expand, select_latents
from lrsa.selection import Selection, select_tokens

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "native": kernel.attend,
    "tiled": tiled.attend,
    "cudnn": functools.partial(tiled.attend, backend="cudnn"),
    "flex": flex.attend,
}


def lrsa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: LRSAConfig,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    impl: str = "auto",
    expand: Expand | None = None,
) -> torch.Tensor:
    """Lag-Relative Sparse Attention over whole rows, in training or in the prefill of an empty cache.

    Args:
        query: `[B, H, T, D]`, after RoPE; key: `[B, G, T, D]`, value: `[B, G, T, Dv]` with `H % G == 0`.
        config: the settings.
        scale: factor of the scores before the softmax, `D ** -0.5` when `None`.
        softcap: scores become `softcap * tanh(score / softcap)`, as in Gemma 2; `"tiled"` and `"cudnn"` refuse it.
        sinks: `[H]`, a further score in the softmax of every query of a head, with value 0, as in GPT-OSS.
        position_ids: `[B, T]` or `[1, T]`; a row is cut into documents where they restart, as packing does.
        attention_mask: the 2D padding mask `[B, T]`, nonzero where a token is real; padding on any side.
        impl: `"reference"` (dense mask, for tests), `"native"` (compiled, CPU), `"tiled"` (PyTorch's flash kernels tile
            by tile, any device), or `"auto"`, which logs once what it chose. Not yet run on a GPU: `"cudnn"` (the same
            tiles by cuDNN), chosen by name only, and `"flex"` (FlexAttention; on a CPU without gradients), which
            `"auto"` takes there for whole rows with a softcap, and `"reference"` for parts.
        expand: of latent attention: makes keys and values of `key` and `value`, which are the latents `c_kv` and
            `k_rope` of `lrsa.latent`.

    Returns:
        `[B, H, T, Dv]` in the query's dtype; 0 at padding. Gradients flow to query, key, value and sinks.

    Raises:
        ValueError: when shapes, dtypes, devices or `impl` cannot be used.

    Source: LRSA, arXiv 2506.11498.
    """
    _check(query, key, value, position_ids, attention_mask, impl, expand is not None)
    softmax = Softmax.of(query, scale, softcap, sinks)
    attend = functools.partial(attend_rows, config=config, softmax=softmax, impl=impl, expand=expand)
    return attend_documents(attend, query, key, value, attention_mask, position_ids)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: LRSAConfig,
    softmax: Softmax,
    impl: str = "auto",
    expand: Expand | None = None,
) -> torch.Tensor:
    """`lrsa_attention` over rows without padding, unchecked; the queries are the last `T` of the `S` tokens of a row.

    Args:
        query: `[B, H, T, D]`; key: `[B, G, S, D]`, value: `[B, G, S, Dv]`, with `T <= S`.

    Returns:
        `[B, H, T, Dv]` in the query's dtype.
    """
    length = key.shape[2]
    expanded = (key, value) if expand is None else expand(key, value)
    states, channels = _of_one_width(query, *expanded), expanded[1].shape[-1]
    is_dense = length <= config.dense_length or config.top_k == config.lag_size
    if is_dense and impl != "reference":  # the oracle takes no shorter way
        if softmax.is_plain:
            return sliding.attend(*states, length, softmax)[..., :channels]  # a window over everything
        # One window, of the queries, behind a sink of all older tokens.
        config = config.replace(sink_size=length - query.shape[2], lag_size=query.shape[2], top_k=1)
    if impl == "auto":
        capped = None if softmax.softcap is None else "whole" if query.shape[2] == length else "part"
        impl = choose(query.device.type, query.dtype, states[0].shape[-1], capped)
    if expand is None:
        selection = select_tokens(key, value, config)
    else:
        selection = Selection(select_latents(key, value, config).index.expand(-1, states[1].shape[1], -1, -1))
    return IMPLEMENTATIONS[impl](*states, selection, config, softmax)[..., :channels]


def _of_one_width(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros as further channels, which change no score and no other channel: kernels take one width for all."""
    width = max(x.shape[-1] for x in states)
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in states)


@functools.cache
def choose(device: str, dtype: torch.dtype, head_dim: int, capped: str | None = None) -> str:
    """The implementation that `"auto"` takes for tensors of this kind, by benchmarks/attention.py; logged once.

    Args:
        capped: for soft-capped scores, queries of `"whole"` rows or of a `"part"`.
    """
    impl = "tiled"
    if capped:
        impl = "flex" if device == "cuda" and capped == "whole" else "reference"
    if device == "cpu":
        try:
            kernel.library(dtype)
            impl = "native"
        except (build.CompilerError, OSError) as error:
            logger.warning("lrsa_attention cannot use 'native', which is faster than %r: %s", impl, error)
    logger.info("lrsa_attention uses %s on %s in %s", describe(impl, device, dtype, head_dim), device, dtype)
    return impl


def describe(impl: str, device: str, dtype: torch.dtype, head_dim: int, capped: str | None = None) -> str:
    """What computes the attention, in words: the implementation and the kernels that it really calls."""
    if impl == "auto":
        impl = choose(device, dtype, head_dim, capped)
    if impl != "tiled":
        kernels = {"native": "compiled for this CPU", "reference": "a dense mask", "cudnn": "cuDNN's kernels"}
        return f"{impl} ({kernels.get(impl, 'FlexAttention')})"
    if sdpa.has_flash(device, dtype, head_dim):
        return "tiled (PyTorch's flash kernels)"
    return "tiled (matrix products: flash takes fp16 and bf16 on CUDA, with a head dim of 8, 16, ... 256)"


def check_impl(impl: str) -> None:
    """Refuse the name of an implementation that does not exist.

    Raises:
        ValueError: when it is neither `"auto"` nor a name in `IMPLEMENTATIONS`.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}.")


def _check(query, key, value, position_ids, attention_mask, impl, is_latent):
    check_impl(impl)
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must be [batch, heads, tokens, head_dim], got {query.dim()}D and {key.dim()}D."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must agree in batch, heads and tokens, got {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError(f"query, key and value must have one dtype and be on one device, got {kinds}: convert them.")
    batch, heads, tokens, channels = query.shape
    if (batch, tokens) != (key.shape[0], key.shape[2]) or (channels != key.shape[3] and not is_latent):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch, tokens and head_dim; "
            "a query shorter than its keys belongs to an LRSACache."
        )
    if not (heads and key.shape[1] and channels):
        raise ValueError(
            f"query and key need at least one head and one channel, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if heads % key.shape[1]:
        raise ValueError(f"query heads ({heads}) must be a multiple of KV heads ({key.shape[1]}).")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, tokens):
        raise ValueError(
            f"attention_mask must be the 2D padding mask [{batch}, {tokens}], got {tuple(attention_mask.shape)}."
        )
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"position_ids must be [{batch}, {tokens}] or [1, {tokens}], got {tuple(position_ids.shape)}.")
