"""How scores become weights, beyond what PyTorch's kernels know: soft caps, and attention sinks as parameters.

A sink is one more key of every head: its score is a parameter, its value 0. Attention that also returns the
log-sum-exp of its scores takes it in afterwards, and a backward that is given the output and the log-sum-exp with the
sink taken in computes the right gradients of query, key and value.

Shapes: B batch, H query heads, G KV heads, T query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Softmax:
    """What turns queries and keys into weights.

    Attributes:
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; `None` leaves them.
        sinks: `[H]`, a further score in the softmax of every query of a head, with value 0; `None` for none.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(cls, query: torch.Tensor, scale=None, softcap=None, sinks=None) -> Softmax:
        """That of queries `[B, H, T, D]`; a scale of `None` is `D ** -0.5`.

        Raises:
            ValueError: when a softcap is not positive, or there is not one sink for every head.
        """
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be above 0, or None for no cap, got {softcap}.")
        if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
            raise ValueError(
                f"sinks must be one number for each of the {query.shape[1]} query heads, got {tuple(sinks.shape)}."
            )
        if sinks is not None:
            sinks = sinks.to(torch.promote_types(query.dtype, torch.float32))
        return cls(query.shape[-1] ** -0.5 if scale is None else scale, softcap, sinks)

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's own attention computes it."""
        return self.softcap is None and self.sinks is None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention by matrix products, in memory for every pair: `[B, H, T, D], [B, G, S, D] x2 -> [B, H, T, D]`.

        Args:
            mask: what is seen, bool, `[T, S]` or `[B, 1 or G, 1 or T, S]`.
        """
        weights = self.weights(query, key, mask).to(value.dtype).flatten(2, 3)
        return (weights @ value).view(*query.shape[:3], value.shape[3])

    def weights(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What each query takes of each key, `[B, G, H / G, T, S]` in fp32 or fp64; with sinks less than 1 in all."""
        batch, heads, tokens, channels = query.shape
        group = heads // key.shape[1]
        scores = query.reshape(batch, key.shape[1], group * tokens, channels) @ key.transpose(2, 3) * self.scale
        scores = scores.unflatten(2, (group, tokens)).to(torch.promote_types(query.dtype, torch.float32))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-3), float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).view(*scores.shape[1:3], 1, 1)
            scores = torch.cat([scores, sinks.expand(*scores.shape[:4], 1)], dim=-1)
        return scores.softmax(-1)[..., : key.shape[2]]


def sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks `[H]`.

    Args:
        lse: `[B, H, T]`, of all scores and the sink.
        grad, out: `[B, H, T, D]`, of the attention with the sink taken in.
    """
    weight = torch.exp(sinks[:, None] - lse)
    return -(weight * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2))
