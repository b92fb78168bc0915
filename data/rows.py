"""A row of tokens, all rows of a run, and the table that the trainer reads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa

from lrsa import PromptFormat

EVALUATED = "evaluation rows have its passage, document or first message"
NOT_CHOSEN = "more than data.max_rows"
EVALUATION_NOT_CHOSEN = "more than data.eval_rows"
NOT_TRAINED = -100
_BLOCK = 256  # rows per piece of the table, far below the 2**31 tokens that 32-bit offsets can count


@dataclass(frozen=True)
class Row:
    """Token ids of a whole row (int32), of which the first `prompt_length` are not trained.

    `answers`, where given, says for every token whether it is trained: questions may stand between answers.
    """

    input_ids: np.ndarray
    prompt_length: int
    answers: np.ndarray | None = field(default=None, kw_only=True)

    @property
    def trained(self) -> np.ndarray:
        """Whether each token is trained, bool."""
        return np.arange(len(self.input_ids)) >= self.prompt_length if self.answers is None else self.answers


@dataclass(frozen=True)
class Records:
    """What a kind of data makes rows of.

    Attributes:
        train, evaluation: records; evaluation is None where rows are held out of `train`.
        held: normal forms of what is evaluated elsewhere, and therefore not trained on.
        first: number of the first record to train on, for messages.
    """

    train: list[dict]
    evaluation: list[dict] | None = None
    held: frozenset[str] = frozenset()
    first: int = 0


@dataclass
class Rows:
    """What a kind of data makes of its settings: rows to train on, rows to evaluate on, and what was left out.

    `held` and `seen` are the normal forms of the passages, documents or first messages that are evaluated and trained
    on. `prompt` is what stands around prompts and answers, where it is not that of the settings.
    """

    source: str
    train: Sequence[Row] = ()
    held: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    prompt: PromptFormat | None = None
    evaluation: list[dict] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    evaluation_dropped: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def to_dataset(rows: Sequence[Row]) -> datasets.Dataset:
    """Columns `input_ids` and `labels` (-100 where a token is not trained; both int32), one entry per row, in memory.

    With `labels` in place the trainer has nothing left to prepare, and no setting of it decides what is trained.
    """
    blocks = [_block(rows[start : start + _BLOCK]) for start in range(0, len(rows), _BLOCK)]
    # Of its own accord datasets pickles the whole table to name it.
    return datasets.Dataset(pa.concat_tables(blocks), fingerprint=fingerprint(rows))


def columns_of_row(row: Row) -> dict[str, np.ndarray]:
    """The same columns of one row."""
    return {"input_ids": row.input_ids, "labels": np.where(row.trained, row.input_ids, NOT_TRAINED).astype(np.int32)}


def fingerprint(rows: Sequence[Row] | Sequence[dict]) -> str:
    """16 hexadecimal digits that tell rows and their order apart, by what is trained or by the evaluation's fields."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        if isinstance(row, Row):
            digest.update(row.input_ids)
            digest.update(row.trained)
        else:
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def _block(rows: Sequence[Row]) -> pa.Table:
    lengths = np.asarray([len(row.input_ids) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    input_ids = np.concatenate([row.input_ids for row in rows])
    labels = np.where(np.concatenate([row.trained for row in rows]), input_ids, NOT_TRAINED).astype(np.int32)
    columns = {"input_ids": input_ids, "labels": labels}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def chosen(count: int, most: int | None, rng: np.random.Generator) -> list[int]:
    """Numbers of at most `most` of `count` things, a random choice in their own order."""
    if most is None or most >= count:
        return list(range(count))
    return sorted(rng.choice(count, most, replace=False).tolist())


def drawn(
    items: Sequence, most: int | None, rng: np.random.Generator, make: Callable[[list], list]
) -> tuple[list, int]:
    """At most `most` rows, made of a random choice of `items`: of as many as it takes, where some make no row.

    Args:
        make: the rows of some of the items.

    Returns:
        the rows, and the number of items and rows that were not needed.
    """
    left, rows, scale = list(items), [], 1
    while left and (most is None or len(rows) < most):
        picked = chosen(len(left), None if most is None else scale * (most - len(rows)), rng)
        rows += make([left[index] for index in picked])
        left = [left[index] for index in sorted(set(range(len(left))).difference(picked))]
        scale *= 2  # few rounds, also where few items make a row
    taken = chosen(len(rows), most, rng)
    return [rows[index] for index in taken], len(left) + len(rows) - len(taken)
