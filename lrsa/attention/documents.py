"""Which tokens of a batch belong together: rows without their padding, cut where position ids restart.

Shapes: B batch, H heads, T tokens of a padded row, D head dim; R real tokens of the N documents of one group, of which
the longest has M.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Documents this much shorter than the longest of their group go into the next group: it bounds the padded share.
SHORTEST_SHARE = 0.9


@dataclass(frozen=True)
class Group:
    """Documents of similar length, laid out from their first token on and padded behind their last.

    Attributes:
        tokens: int64 `[R]`, the real tokens: their positions in the flattened batch `B * T`.
        places: int64 `[R]`, where they go in the flattened group `N * M`.
        shape: `(N, M)`.
        whole: the group is all rows of the batch just as they lie: nothing has to be moved.
    """

    tokens: torch.Tensor | None
    places: torch.Tensor | None
    shape: tuple[int, int]
    whole: bool = False


class Gather(torch.autograd.Function):
    """States of a batch `[B, H, T, D]` -> those of its groups, each `[N, H, M, D]`, 0 behind a document's end.

    A token has one place at most, so the gradient is moved back as it came; autograd would add up.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, groups: list[Group]) -> tuple[torch.Tensor, ...]:
        ctx.groups, ctx.shape = groups, (states.shape[0], states.shape[2])
        return _gather(states, groups)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter(grads, ctx.groups, ctx.shape), None


class Scatter(torch.autograd.Function):
    """The way back: states of groups -> those of the batch of shape `(B, T)`, 0 at padding."""

    @staticmethod
    def forward(ctx, groups: list[Group], shape: tuple[int, int], *parts: torch.Tensor) -> torch.Tensor:
        ctx.groups = groups
        return _scatter(parts, groups, shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        return None, None, *_gather(grad, ctx.groups)


def _gather(states: torch.Tensor, groups: list[Group]) -> tuple[torch.Tensor, ...]:
    tokens = states.transpose(1, 2).flatten(0, 1)
    return tuple(
        _moved(tokens, g.tokens, g.places, g.shape[0] * g.shape[1]).unflatten(0, g.shape).transpose(1, 2)
        for g in groups
    )


def _scatter(parts: tuple[torch.Tensor, ...], groups: list[Group], shape: tuple[int, int]) -> torch.Tensor:
    _, heads, _, channels = parts[0].shape
    total = parts[0].new_zeros(shape[0] * shape[1], heads, channels)
    for part, group in zip(parts, groups, strict=True):
        total[group.tokens] = part.transpose(1, 2).flatten(0, 1)[group.places]
    return total.unflatten(0, shape).transpose(1, 2)


def _moved(tokens: torch.Tensor, source: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    moved = tokens.new_zeros(length, *tokens.shape[1:])
    moved[places] = tokens[source]
    return moved


def find_documents(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int]
) -> list[Group]:
    """Split a batch into documents and sort them into groups of similar length.

    A document starts at a row's first real token, and wherever the position id of a real token is not above that of
    the real token before it. Padding belongs to no document, wherever it lies.

    Args:
        attention_mask: `[B, T]`, nonzero where a token is real; `None` when all are.
        position_ids: `[B, T]` or `[1, T]`; `None` when they count up through the row.
        shape: `(B, T)`.

    Returns:
        The groups; a single `whole` one when every row is one document from its first token to its last.
    """
    if attention_mask is None and position_ids is None:
        return [Group(None, None, shape, whole=True)]
    # Every layer of a forward asks about the same tensors: the answer stays on the first of them.
    holder, other = (attention_mask, position_ids) if attention_mask is not None else (position_ids, None)
    if any(x is not None and x.is_inference() for x in (holder, other)):  # nothing tells whether these have changed
        return _find(attention_mask, position_ids, shape)
    versions = [0 if x is None else x._version for x in (holder, other)]
    known = getattr(holder, "lrsa_documents", None)
    if known is not None and known[0] is other and known[1:3] == (versions, shape):
        return known[3]
    groups = _find(attention_mask, position_ids, shape)
    holder.lrsa_documents = other, versions, shape, groups
    return groups


def attend_documents(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Run `attend`, an attention over rows without padding, over every document of a batch by itself.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, G, T, D]`, or of other widths that `attend` takes.
        attention_mask, position_ids: as `find_documents` takes them.

    Returns:
        `[B, H, T, Dv]`, as wide as what `attend` returns; 0 at padding.
    """
    shape = query.shape[0], query.shape[2]
    groups = find_documents(attention_mask, position_ids, shape)
    if len(groups) == 1 and groups[0].whole:
        return attend(query, key, value)
    if not groups:
        channels = attend(*(x[:, :, :1] for x in (query, key, value))).shape[3]
        return query.new_zeros(*query.shape[:3], channels)
    parts = zip(*(Gather.apply(x, groups) for x in (query, key, value)), strict=True)
    return Scatter.apply(groups, shape, *(attend(*part) for part in parts))


def _find(attention_mask, position_ids, shape) -> list[Group]:
    batch, tokens = shape
    device = (attention_mask if attention_mask is not None else position_ids).device
    real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    flat = real.flatten().nonzero().squeeze(1)
    row = flat // tokens
    start = torch.ones_like(flat, dtype=torch.bool)
    start[1:] = row[1:] != row[:-1]
    if position_ids is not None:
        position = position_ids.cpu().expand(shape).flatten()[flat]
        start[1:] |= position[1:] <= position[:-1]
    first = start.nonzero().squeeze(1)
    length = torch.diff(first, append=torch.tensor([len(flat)]))
    if len(first) == batch and (length == tokens).all():
        return [Group(None, None, shape, whole=True)]
    groups = []
    order = length.argsort(descending=True, stable=True)
    while len(order):
        longest = int(length[order[0]])
        members = int((length[order] >= SHORTEST_SHARE * longest).sum())
        group, order = order[:members].sort().values, order[members:]
        offset = torch.arange(longest)
        valid = offset < length[group][:, None]
        source = flat[(first[group][:, None] + offset)[valid]]
        places = valid.flatten().nonzero().squeeze(1)
        groups.append(Group(source.to(device), places.to(device), tuple(valid.shape)))
    return groups
