"""Sparse attention on a CPU, compiled on first use: gathers the visible keys and computes visible pairs only.

The kernel is `kernel.cpp`. It computes bf16 and fp16 in fp32 inside, and fp64 in fp64; nothing of size `T x T` exists.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

from lrsa.attention.cpu import build
from lrsa.attention.softmax import Softmax, sinks_gradient
from lrsa.config import LRSAConfig
from lrsa.selection import Selection

SOURCE = Path(__file__).with_suffix(".cpp")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selection: Selection,
    config: LRSAConfig,
    softmax: Softmax,
) -> torch.Tensor:
    """`lrsa.attention.reference.attend` on a CPU, in memory that grows linearly in `S`; with fewer KV heads than
    threads, the backward holds gradients of keys and values for every thread.

    Raises:
        ValueError: when the tensors are not on a CPU, or of other dtypes.
        CompilerError: when there is no C++ compiler.
    """
    devices = {x.device.type for x in (query, key, value)}
    if devices != {"cpu"}:
        raise ValueError(f"impl='native' runs on a CPU, got tensors on {', '.join(sorted(devices))}: use impl='auto'.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}: convert them."
        )
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"impl='native' takes fp16, bf16, fp32 or fp64, got {query.dtype}: convert query, key and value."
        )
    if query.dtype == torch.float16:
        return attend(*(x.float() for x in (query, key, value)), selection, config, softmax).to(query.dtype)
    numbers = config.sink_size, config.lag_size, softmax.scale, softmax.softcap or 0.0
    return _attend(query, key, value, selection.index, softmax.sinks, *numbers)[0]


# Operators of their own, so that selective checkpointing can keep the output and compilers see one opaque call.
@torch.library.custom_op("lrsa::native", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    sinks: torch.Tensor | None,
    sink_size: int,
    lag_size: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, T, D]` and log-sum-exp `[B, G, T, H / G]`, as a power of 2; the sinks are part of both."""
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    out = _like(query)
    lse = query.new_empty(batch, kv_heads, tokens, heads // kv_heads, dtype=_exact(query))
    states = {"query": query, "key": key, "value": value, "out": out, "lse": lse, "index": index}
    if sinks is not None:
        states["sinks"] = sinks.to(lse.dtype)
    _call("lrsa_forward", states, sink_size, lag_size, scale, softcap)
    return out, lse


@torch.library.custom_op("lrsa::native_backward", mutates_args=())
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
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for query, key and value."""
    parts = _parts(key.shape[0] * key.shape[1], torch.get_num_threads())
    grad_query = _like(query)
    grad_key, grad_value = (key.new_zeros(parts, *key.shape, dtype=_exact(key)) for _ in range(2))
    states = {"query": query, "key": key, "value": value, "out": out, "lse": lse, "index": index, "grad": grad}
    results = {"grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    _call("lrsa_backward", states | results, sink_size, lag_size, scale, softcap, parts)
    return grad_query, *((x[0] if parts == 1 else x.sum(0)).to(key.dtype) for x in (grad_key, grad_value))


@_attend.register_fake
def _(query, key, value, index, *rest):
    shape = query.shape[0], key.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    return _like(query), query.new_empty(shape, dtype=_exact(query))


@_attend_backward.register_fake
def _(grad, query, key, value, *rest):
    return _like(query), *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))


def _setup(ctx, inputs, output):
    query, key, value, index, sinks, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, index, sinks)


def _backward(ctx, grad, grad_lse):
    *states, sinks = ctx.saved_tensors
    grads = _attend_backward(grad, *states, *ctx.numbers)
    if sinks is not None:
        out, lse = states[3:5]
        sinks = sinks_gradient(sinks, lse.transpose(2, 3).flatten(1, 2) * math.log(2), grad, out)
    return *grads, None, sinks, *[None] * len(ctx.numbers)


_attend.register_autograd(_backward, setup_context=_setup)


def _parts(heads: int, threads: int) -> int:
    """Parts that the windows of a head are divided into in the backward, each with gradients of its keys of its own.

    One thread at a time adds to a part, in an order that does not depend on timing.
    """
    if 0 < heads < threads:
        return -(-threads // heads)
    return 1 if heads % threads == 0 or heads >= 4 * threads else 2


def _exact(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _like(query: torch.Tensor) -> torch.Tensor:
    """An empty `[B, H, T, D]`, token by token with the heads inside, as models read it."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))


class _Problem(ctypes.Structure):
    """`Problem` of kernel.cpp, field by field."""

    TENSORS = ("query", "key", "value", "out", "grad", "grad_query")
    BUFFERS = ("lse", "grad_key", "grad_value", "scratch", "sinks", "index")
    NUMBERS = (
        *("batch", "heads", "kv_heads", "tokens", "length", "channels"),
        *("sink_size", "lag_size", "top_k", "windows", "parts", "threads", "bf16"),
    )
    _fields_ = (
        *((name, _Tensor) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in BUFFERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel compiled for tensors of this dtype.

    Raises:
        CompilerError: when it cannot be compiled.
    """
    compiled = build.load(SOURCE, f"REAL={'double' if dtype == torch.float64 else 'float'}")
    compiled.lrsa_scratch.restype = ctypes.c_int64
    return compiled


def _call(name: str, states: dict, sink_size: int, lag_size: int, scale: float, softcap: float, parts: int = 1):
    """Run one of the kernel's functions over named tensors."""
    # Held here by name until the call is over: the kernel knows addresses only.
    states = {k: x if x.stride(-1) == 1 and k in _Problem.TENSORS else x.contiguous() for k, x in states.items()}
    query, key, index = (states[k] for k in ("query", "key", "index"))
    problem = _Problem(
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        tokens=query.shape[2],
        length=key.shape[2],
        channels=query.shape[3],
        sink_size=sink_size,
        lag_size=lag_size,
        top_k=index.shape[3],
        windows=index.shape[2],
        parts=parts,
        threads=torch.get_num_threads(),
        bf16=query.dtype == torch.bfloat16,
        scale=scale,
        softcap=softcap,
    )
    for k, x in states.items():
        tensor = k in _Problem.TENSORS
        setattr(problem, k, _Tensor(x.data_ptr(), x.stride()[:3]) if tensor else x.data_ptr())
    compiled = library(query.dtype)
    scratch = query.new_empty(compiled.lrsa_scratch(ctypes.byref(problem)), dtype=_exact(query))
    problem.scratch = scratch.data_ptr()
    getattr(compiled, name)(ctypes.byref(problem))
