"""Scores are means with bootstrap intervals that hold what they promise."""

import numpy as np
import pytest

from lrsa.evaluation import Score, paired_difference


def test_value_is_the_mean_and_the_interval_is_that_of_the_mean():
    rows = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    score = Score.from_rows(rows, "points")
    assert score.value == pytest.approx(rows.mean(), abs=1e-12)
    assert (score.n, score.unit, score.per_row) == (400, "points", tuple(rows))
    half = 1.96 * rows.std(ddof=1) / 400**0.5  # what normal theory says for so many rows
    assert score.low == pytest.approx(score.value - half, abs=0.15 * half)
    assert score.high == pytest.approx(score.value + half, abs=0.15 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    scores = [Score.from_rows(rng.binomial(1, 0.7, size=80), "right") for _ in range(150)]
    covered = np.mean([score.low <= 0.7 <= score.high for score in scores])
    assert 0.90 <= covered <= 0.99  # 95%, give or take what 150 data sets of 80 rows can show


def test_same_seed_same_interval_other_seed_another():
    rows = np.random.default_rng(3).random(50)
    assert Score.from_rows(rows, "x", seed=5) == Score.from_rows(rows, "x", seed=5)
    assert Score.from_rows(rows, "x", seed=5).low != Score.from_rows(rows, "x", seed=6).low


def test_pairing_rows_sees_a_difference_that_two_intervals_hide():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 5, size=200)
    a = Score.from_rows(difficulty + 0.5 + rng.normal(0, 0.5, size=200), "x")
    b = Score.from_rows(difficulty, "x")
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(a.value - b.value)
    assert 0 < difference.low < 0.5 < difference.high
    assert a.low < b.high  # separate intervals overlap


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="0 rows"):
        Score.from_rows([], "F1")
    with pytest.raises(ValueError, match=r"row 1 has nats per token nan.*not finite"):
        Score.from_rows([1.0, float("nan")], "nats per token")
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(Score.from_rows([1, 2], "F1"), Score.from_rows([1, 2, 3], "F1"))
