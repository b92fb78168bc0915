"""Teaches the selection which tokens later queries will attend to: a loss on the scores, inside the attention function.

The scores have no parameters, but they are made of keys and values, which LoRA does change. The target is where the
model itself would look with the full cache: the attention that later queries send to every token of a window, times the
norm of the token's value. The loss is the cross-entropy between that and the softmax of the window's scores. Its
gradient is attached to the attention's output, as mixture-of-experts code attaches auxiliary losses, so that it
survives checkpointing, ZeRO and accumulation.

Shapes: B batch, H query heads, G KV heads, T tokens of a row, D head dim; of N documents M tokens each, A of them
queries, W complete windows, L = lag_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from lrsa.attention.documents import Gather, Group, find_documents
from lrsa.attention.softmax import Softmax
from lrsa.config import LRSAConfig
from lrsa.latent import Expand, scored
from lrsa.scoring import window_deviation

BLOCK = 2**24  # attention weights held at once


class SelectionSupervision:
    """Targets and loss of the selection for one batch, over all layers of a model.

    The model runs as `model(**inputs, lrsa_supervision=self)` under the attention "lrsa", which calls `attach`.

    Args:
        config: the settings whose selection is taught; `top_k` does not matter.
        predicting: bool `[B, T]`, the tokens whose queries count, such as those that predict a trained token.
        layers: indices of the layers that are taught.
        weight: of the loss, a mean over layers, documents and KV heads, against the loss it is trained with.
        temperature: factor of the scores' deviations before their softmax. LagKV's own softmax is almost flat.
        queries: maximum number of a document's predicting tokens, spread evenly; they bound time and memory.

    Attributes:
        losses: layer -> loss of this batch without the weight, in nats.
        reached: layers that called `attach`.
        upstream: factor that the backward of the whole loss starts with; see `scale_with`.
    """

    def __init__(
        self,
        config: LRSAConfig,
        predicting: torch.Tensor,
        layers: Sequence[int],
        weight: float = 1.0,
        temperature: float = 20.0,
        queries: int = 256,
    ):
        self.config = config
        self.predicting = predicting
        self.layers = layers
        self.weight = weight
        self.temperature = temperature
        self.queries = queries
        self.losses: dict[int, torch.Tensor] = {}
        self.reached: set[int] = set()
        self.upstream: torch.Tensor | float = 1.0
        self._targets: dict[int, list[torch.Tensor]] = {}

    def scale_with(self, loss: torch.Tensor) -> None:
        """Let the gradient that reaches `loss` scale the supervision: accumulation, loss scaling, averaging."""

        def remember(grad: torch.Tensor) -> None:
            self.upstream = grad

        loss.register_hook(remember)

    def attach(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        expand: Expand | None = None,
        **softmax,
    ) -> torch.Tensor:
        """Attach the gradient of the layer's loss to `out`.

        Args:
            layer: index of the layer.
            query, key, value, position_ids, attention_mask, expand: as `lrsa_attention` takes them.
            out: the attention's output.
            softmax: `scale`, `softcap` and `sinks`, as `lrsa_attention` takes them.

        Returns:
            `out`.
        """
        self.reached.add(layer)
        groups = find_documents(attention_mask, position_ids, (query.shape[0], query.shape[2]))
        if layer not in self.layers or not groups or not torch.is_grad_enabled():
            return out
        if layer not in self._targets:  # else a checkpoint computes the layer again
            attended = (key, value) if expand is None else expand(key, value)
            parts = zip(*(_laid_out(x.detach(), groups) for x in (query, *attended)), strict=True)
            places = _places(self.predicting, groups, self.queries)
            targets = [future_attention(*x, at, self.config, **softmax) for x, at in zip(parts, places, strict=True)]
            self._targets[layer] = targets if expand is None else [x.mean(1, keepdim=True) for x in targets]
        states = (key, value) if expand is None else scored(key, value)
        parts = zip(self._targets[layer], *(_laid_out(x, groups) for x in states), strict=True)
        losses = [selection_loss(*part, self.config, self.temperature).mean(1).sum() for part in parts]
        # Padding does not count: where processes share rows, each of its tokens is a document.
        documents = sum(group.shape[0] for group in groups if group.shape[1] > 1)
        loss = torch.stack(losses).sum() / max(documents, 1)
        self.losses[layer] = loss.detach()
        return _Attach.apply(out, loss, self, self.weight / len(self.layers))


class _Attach(torch.autograd.Function):
    """The output unchanged; in the backward the loss gets its weight as gradient, as if it were added at the end."""

    @staticmethod
    def forward(ctx, out, loss, supervision: SelectionSupervision, weight: float):
        ctx.supervision, ctx.weight = supervision, weight
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        upstream = torch.as_tensor(ctx.supervision.upstream, device=grad.device, dtype=torch.float32)
        return grad, ctx.weight * upstream, None, None


@torch.no_grad()
def future_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    predicting: torch.Tensor,
    config: LRSAConfig,
    **softmax,
) -> torch.Tensor:
    """What later queries take from each token, with the full cache: their attention to it times the norm of its value.

    A query counts for the windows at distance two or more before its own: those it meets compressed. Attention parked
    on tokens with small values, of which nothing is missed, counts for little.

    Args:
        query: `[N, H, M, D]`; key, value: `[N, G, M, D]`, of documents from their first token on.
        predicting: int64 `[N, A]`, positions of the queries that count, -1 where a document has fewer.
        softmax: `scale`, `softcap` and `sinks`, as `lrsa_attention` takes them.

    Returns:
        `[N, G, W - 1, L]` fp32 (fp64 for fp64), a mean over those queries and the query heads of a KV head; norms are
        relative to their mean over the document and head. Memory grows linearly in `M`.
    """
    documents, heads, tokens, _ = query.shape
    key, softmax = key.to(torch.promote_types(key.dtype, torch.float32)), Softmax.of(query, **softmax)
    count = max(max(tokens - config.sink_size, 0) // config.lag_size - 1, 0)
    total = key.new_zeros(documents, key.shape[1], count * config.lag_size)
    first, stop = config.sink_size, config.sink_size + count * config.lag_size
    position = torch.arange(tokens, device=query.device)
    window = (position - config.sink_size).div(config.lag_size, rounding_mode="floor")
    for at in predicting.split(max(BLOCK // (documents * heads * tokens), 1), dim=1):
        rows = query.gather(2, at.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, query.shape[3]))
        weights = softmax.weights(rows.to(key.dtype), key, (position <= at[..., None])[:, None])
        weights = weights.nan_to_num()[..., first:stop]  # of absent queries all scores are -inf
        compressed = window[at.clamp(min=0)][..., None] - window[first:stop] >= 2
        total += (weights * compressed[:, None, None]).sum((2, 3))
    queries = (predicting >= 0).sum(1).clamp(min=1) * (heads // key.shape[1])
    norm = torch.linalg.vector_norm(value, dim=-1, dtype=key.dtype)
    mean = norm.sum(-1, keepdim=True) / (norm > 0).sum(-1, keepdim=True).clamp(min=1)  # it is 0 behind a document
    norm = norm[..., first:stop] / mean.where(mean > 0, 1)
    return (total * norm / queries[:, None, None]).unflatten(2, (count, config.lag_size))


def selection_loss(
    target: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: LRSAConfig, temperature: float
) -> torch.Tensor:
    """Cross-entropy between what tokens will be needed for and the softmax of their window's scores.

    Args:
        target: `[N, G, W - 1, L]`, from `future_attention`.
        key, value: `[N, G, M, D]`; gradients flow to both.
        temperature: factor of the deviations before the softmax over a window.

    Returns:
        `[N, G]`, for each document and KV head the sum over windows and tokens. It is not divided by the target's
        total: heads and layers that take little from what is compressed have little to learn.
    """
    deviation = window_deviation(key, config) + config.value_weight * window_deviation(value, config)
    return -(target * (temperature * deviation).log_softmax(-1)).sum((2, 3))


def _laid_out(states: torch.Tensor, groups: list[Group]) -> tuple[torch.Tensor, ...]:
    return (states,) if len(groups) == 1 and groups[0].whole else Gather.apply(states, groups)


def _places(predicting: torch.Tensor, groups: list[Group], most: int) -> list[torch.Tensor]:
    """For each group the positions of predicting tokens within their documents, `[N, A]`, -1 behind the last."""
    result = []
    for marks in _laid_out(predicting[:, None, :, None], groups):
        found = []
        for document in marks[:, 0, :, 0]:
            at = document.nonzero().squeeze(1)
            if len(at) > most:
                at = at[torch.linspace(0, len(at) - 1, most, device=at.device).round().long()]
            found.append(at)
        result.append(pad_sequence(found, batch_first=True, padding_value=-1))
    return result
