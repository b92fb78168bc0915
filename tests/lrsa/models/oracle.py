"""What a model must give under LRSA, by the model's own eager attention: the rule as a mask over its real keys.

Nothing of `lrsa` is used but its settings. The rule is written out once more, token by token.

Shapes: B batch, H query heads, G KV heads, T tokens, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from lrsa import LRSAConfig


@contextlib.contextmanager
def oracle(model: PreTrainedModel, config: LRSAConfig | None) -> Iterator[list[str]]:
    """Let a model, which runs its eager attention over one whole row, see by the rule (None: all that it sees anyway).

    Yields:
        a list that names the kind of every attention call so far: "compressed", "sliding" or "kept".
    """
    calls, patched, text = [], {}, model.config.get_text_config(decoder=True)
    modules = {type(module).__module__ for module in model.modules()}
    for name in modules:
        own = getattr(sys.modules[name], "eager_attention_forward", None)
        if own is not None:
            patched[name] = own
            sys.modules[name].eager_attention_forward = functools.partial(_attend, own, text, config, calls)
    latent = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in latent:
        module.expand_kv = functools.partial(_expand, module, module.expand_kv)
    try:
        yield calls
    finally:
        for module in latent:
            vars(module).pop("oracle_latent", None)
            del module.expand_kv
        for name, own in patched.items():
            sys.modules[name].eager_attention_forward = own


def _expand(module, own, c_kv, k_rope):
    """Remember what keys and values are expanded from: one key, the whole latent, and one value for all heads."""
    module.oracle_latent = torch.cat([c_kv, k_rope], -1), c_kv
    return own(c_kv, k_rope)


def _attend(own, text, config, calls, module, query, key, value, attention_mask, *args, **options):
    """The model's own eager attention; a mask that is causal and reaches back to the first token is cut down."""
    if module.config is not text or getattr(module, "is_causal", True) is False:  # the encoder of an image
        return own(module, query, key, value, attention_mask, *args, **options)
    tokens, total = query.shape[2], key.shape[2]
    causal = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
    own_mask = causal[None, None] if attention_mask is None else attention_mask[..., :total] > -1
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        own_mask = attention_mask[..., :total]
    layer = getattr(module, "layer_idx", None)
    if not torch.equal(own_mask.expand(1, 1, tokens, total)[0, 0], causal):
        calls.append("sliding")
    elif config is None or layer in config.skip_layers:
        calls.append("kept")
    else:
        calls.append("compressed")
        latent = getattr(module, "oracle_latent", None)
        seen = visible(*((key, value) if latent is None else latent), config)
        seen = seen.repeat_interleave(query.shape[1] // seen.shape[1], 1)
        hidden = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
        attention_mask = hidden
    with _exact_softmax():
        return own(module, query, key, value, attention_mask, *args, **options)


def visible(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> torch.Tensor:
    """bool `[B, G, T, T]`: which query sees which key, by section 1 of the method, window by window."""
    batch, heads, tokens, _ = keys.shape
    sink, lag, top_k = config.sink_size, config.lag_size, config.top_k
    position = torch.arange(tokens)
    window = torch.where(position < sink, -1, (position - sink) // lag)
    seen = (window[:, None] - window <= 1) | (window == -1)
    seen = seen.expand(batch, heads, tokens, tokens).clone()
    for w in range(max((tokens - sink) // lag - 1, 0)):
        first = sink + w * lag
        score = sum(
            weight * _stand_out(x[:, :, first : first + lag], x[:, :, first + lag : first + 2 * lag])
            for weight, x in ((1.0, keys), (config.value_weight, values))
        )
        kept = first + score.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        far = (window >= w + 2)[None, None, :, None]
        chosen = torch.zeros(batch, heads, 1, tokens, dtype=torch.bool)
        chosen.scatter_(3, kept[:, :, None], True)
        seen |= far & chosen
    return seen & (position[:, None] >= position)


@torch.no_grad()
def _stand_out(window: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Softmax over a window's tokens of the std of their channels, normalised by the reference: `[B, G, L]`."""
    low, high = reference.float().amin(2, keepdim=True), reference.float().amax(2, keepdim=True)
    normalised = ((window.float() - low) / (high - low)).masked_fill((high == low).expand(window.shape), 0.0)
    return normalised.std(-1).softmax(-1)


@contextlib.contextmanager
def _exact_softmax() -> Iterator[None]:
    """Eager attentions take their softmax in fp32; of fp64 models it is taken in fp64, so that errors show."""
    own = torch.nn.functional.softmax

    def softmax(x, *args, dtype=None, **options):
        return own(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **options)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = own
