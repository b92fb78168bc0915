"""A measured number with its uncertainty: the mean over rows and a bootstrap interval over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Score:
    """The mean of one score per row, with a 95% interval.

    Attributes:
        value: mean over rows; every row counts the same.
        low, high: percentile bootstrap interval of that mean, rows being the unit that is resampled. When all rows have
            the same score the interval has width 0, which says nothing about rows that were not measured.
        n: number of rows.
        unit: what is measured, for example `"F1"` or `"nats per token"`.
        per_row: the score of every row, in row order.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str
    per_row: tuple[float, ...]

    @classmethod
    def from_rows(cls, per_row: Sequence[float], unit: str, seed: int = 0) -> Score:
        """Mean and interval of one score per row.

        Raises:
            ValueError: when there is no row, or a score is not a finite number.
        """
        per_row = tuple(float(score) for score in per_row)
        if not per_row:
            raise ValueError(f"cannot measure {unit} on 0 rows: give at least one evaluation row.")
        for row, score in enumerate(per_row):
            if not math.isfinite(score):
                raise ValueError(
                    f"row {row} has {unit} {score}: the model's weights or its activations are not finite; "
                    "check the adapter, or evaluate in bfloat16 or float32 instead of float16."
                )
        low, high = _bootstrap_interval(np.array(per_row), seed)
        return cls(math.fsum(per_row) / len(per_row), low, high, len(per_row), unit, per_row)

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return asdict(self) | {"per_row": list(self.per_row)}

    @classmethod
    def from_dict(cls, values: dict) -> Score:
        """The score that `to_dict` was called on."""
        return cls(**values | {"per_row": tuple(values["per_row"])})

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_difference(a: Score, b: Score, seed: int = 0) -> Score:
    """Score `a` minus score `b` of the same rows; its interval is far narrower than that of two separate samples.

    Raises:
        ValueError: when the two were not measured on equally many rows or in the same unit.
    """
    if (a.n, a.unit) != (b.n, b.unit):
        raise ValueError(
            f"cannot pair {a.n} rows ({a.unit}) with {b.n} rows ({b.unit}): measure both on the same rows."
        )
    return Score.from_rows([x - y for x, y in zip(a.per_row, b.per_row, strict=True)], a.unit, seed)


def _bootstrap_interval(per_row: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of the mean over rows that are drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(per_row)
    block = max(1, DRAWS_AT_ONCE // n)
    starts = range(0, RESAMPLES, block)
    means = [per_row[rng.integers(n, size=(min(block, RESAMPLES - start), n))].mean(1) for start in starts]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)
