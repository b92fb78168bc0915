"""Which tokens of a batch belong together: rows without their padding, cut where position ids restart.

Shapes: B batch, T tokens of a padded row, N documents of one group, M tokens of the longest of them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

# Documents this much shorter than the longest of their group go into the next group: it bounds the padded share.
SHORTEST_SHARE = 0.75


@dataclass(frozen=True)
class Group:
    """Documents of similar length, laid out from their first token on and padded behind their last.

    Attributes:
        index: int64 `[N, M]`, position of the token in the flattened batch `B * T` (0 for padding).
        valid: bool `[N, M]`.
        whole: the group is all rows of the batch just as they lie: nothing has to be gathered.
    """

    index: torch.Tensor | None
    valid: torch.Tensor | None
    whole: bool = False


_memo: tuple | None = None  # every layer of a model asks about the same two tensors


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
    global _memo
    if attention_mask is None and position_ids is None:
        return [Group(None, None, whole=True)]
    asked = (_identity(attention_mask), _identity(position_ids), shape)
    if (
        _memo is not None
        and _memo[0] == asked
        and all(t is None or ref() is t for ref, t in zip(_memo[1], (attention_mask, position_ids), strict=True))
    ):
        return _memo[2]
    groups = _find(attention_mask, position_ids, shape)
    references = tuple((lambda: None) if t is None else weakref.ref(t) for t in (attention_mask, position_ids))
    _memo = (asked, references, groups)
    return groups


def _identity(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (id(tensor), 0 if tensor.is_inference() else tensor._version)


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
        return [Group(None, None, whole=True)]
    groups = []
    order = length.argsort(descending=True, stable=True)
    while len(order):
        longest = int(length[order[0]])
        members = int((length[order] >= SHORTEST_SHARE * longest).sum())
        group, order = order[:members].sort().values, order[members:]
        offset = torch.arange(longest)
        valid = offset < length[group][:, None]
        index = torch.where(valid, flat[(first[group][:, None] + offset).clamp(max=len(flat) - 1)], 0)
        groups.append(Group(index.to(device), valid.to(device)))
    return groups
