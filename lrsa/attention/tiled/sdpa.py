"""PyTorch's dense attention kernels, called tile by tile: each gives its output and log-sum-exp, and a backward that
takes the output and log-sum-exp of *all* tiles together, which makes the gradients of the tiles add up to the whole.

Shapes: B batch, H query heads, G KV heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten


def sizes(query: torch.Tensor) -> tuple[int, int, bool]:
    """What suits the kernels for these queries: queries of a window per tile, tokens of windows per call, and whether a
    mask costs less than a call.

    The CPU kernel computes what a mask hides, works best on what fits its caches, and is slow on few keys; matrix
    products need memory for every pair of a tile. Flash on a GPU skips what causality hides in blocks of 128, and wants
    large calls.
    """
    small = query.device.type == "cpu" or not _has_flash(query)
    return (64, 1024, True) if small else (2**30, 2**30, False)


def forward(query, key, value, causal: bool, scale: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend `[B, H, T, D]` over `[B, G, S, D]`: output like the query, log-sum-exp `[B, H, T]`, fp32 or fp64.

    With `causal`, the last `T` keys are the queries' own and none sees a later one. On a GPU such a tile has to be
    square: kernels disagree on what causality means elsewhere. `backend` is `"flash"` or, on NVIDIA GPUs, `"cudnn"`.
    """
    if _is_cudnn(backend, query, key):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.reshape(out.shape[:3])
    if not _has_flash(query):
        return _products_forward(query, key, value, causal, scale)
    if query.device.type == "cpu":
        query, key, value = _exact_where_faster(query, key, value, columns=key.shape[2])
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=_mask(query, key, causal), scale=scale
        )
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return out, lse


def backward(grad, query, key, value, out, lse, causal: bool, scale: float, backend: str) -> tuple[torch.Tensor, ...]:
    """Gradients for the query, key and value of one tile, given the output and log-sum-exp of all tiles."""
    if _is_cudnn(backend, query, key):
        # PyTorch finds cuDNN's plan by the layout of query, key and value alone; the others must be laid out as its
        # own forward would have made them, or a plan for another layout would read them wrongly.
        grad, out = (torch.empty_like(query).copy_(x) for x in (grad, out))
        none = query.new_zeros((), dtype=torch.int64)  # the state of dropout's random numbers
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, lse.contiguous().unsqueeze(-1), none, none, None, None, None,
            query.shape[2], key.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
    if not _has_flash(query):
        return _products_backward(grad, query, key, value, out, lse, causal, scale)
    if query.device.type == "cpu":
        grad, query, key, value, out = _exact_where_faster(grad, query, key, value, out, columns=key.shape[2])
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=_mask(query, key, causal), scale=scale
        )
    state = query.new_empty(2, dtype=torch.uint64)  # of dropout's random numbers; there is none
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2],
        0.0, causal, state, state, scale=scale,
    )  # fmt: skip


def check(backend: str, query: torch.Tensor) -> None:
    """Refuse what cuDNN cannot compute.

    Raises:
        ValueError: when it cannot.
    """
    if backend == "cudnn" and (not query.is_cuda or not _has_flash(query)):
        raise ValueError(
            "impl='cudnn' takes fp16 or bf16 on an NVIDIA GPU and a head dim of 8, 16, ... 256, got "
            f"{query.dtype} on {query.device.type} and {query.shape[-1]}: use impl='auto'."
        )


def _is_cudnn(backend: str, query: torch.Tensor, key: torch.Tensor) -> bool:
    """cuDNN takes no tile of a single query or key; flash does."""
    return backend == "cudnn" and query.shape[2] > 1 and key.shape[2] > 1


def _mask(query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor | None:
    """`[T, S]` to add to scores: the last `T` keys are the queries' own, and none sees a later one."""
    if not causal:
        return None
    rows, columns = query.shape[2], key.shape[2]
    return query.new_full((rows, columns), float("-inf")).triu(1 + columns - rows)


def _exact_where_faster(*states: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...]:
    """Half precision as fp32 where the CPU kernel is several times slower in half precision: for small tiles, and for
    all on a CPU without AVX-512."""
    half = states[0].dtype in (torch.float16, torch.bfloat16)
    slow = columns < 512 or torch.backends.cpu.get_cpu_capability() != "AVX512"
    return tuple(x.float() for x in states) if half and slow else states


def has_flash(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a flash kernel takes such tensors; the rest is computed by matrix products, tile by tile."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device == "cpu" or (device == "cuda" and half and head_dim <= 256 and head_dim % 8 == 0)


def _has_flash(query: torch.Tensor) -> bool:
    return has_flash(query.device.type, query.dtype, query.shape[-1])


def _products_forward(query, key, value, causal, scale):
    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]) @ value[:, :, None]
    return out.flatten(1, 2), lse.flatten(1, 2)


def _products_backward(grad, query, key, value, out, lse, causal, scale):
    batch, kv_heads = key.shape[:2]
    grouped = (batch, kv_heads, -1, *query.shape[2:])
    weights = torch.exp(_scores(query, key, causal, scale) - lse.reshape(grouped[:4])[..., None])
    grad, out = grad.reshape(grouped), out.reshape(grouped)
    grad_value = (weights.transpose(-1, -2) @ grad).sum(2)
    grad_scores = weights * (grad @ value[:, :, None].transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    grad_query = (grad_scores @ key[:, :, None]).reshape(query.shape)
    grad_key = (grad_scores.transpose(-1, -2) @ query.reshape(grouped)).sum(2)
    return grad_query, grad_key, grad_value


def _scores(query, key, causal, scale):
    """`[B, G, H / G, T, S]`."""
    batch, kv_heads = key.shape[:2]
    scores = query.reshape(batch, kv_heads, -1, *query.shape[2:]) @ key[:, :, None].transpose(-1, -2) * scale
    if causal:
        scores = scores + _mask(query, key, causal)
    return scores
