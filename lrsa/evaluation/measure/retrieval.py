"""Retrieval accuracy: how many symbols of a code that stands somewhere in the prompt the model repeats in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrsa.evaluation.measure.generation import generate_answers
from lrsa.evaluation.score import Score


def evaluate_retrieval(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[list[int], list], object] | None = None,
    seed: int = 0,
) -> Score:
    """Mean share of the answers' symbols that a greedy answer has in the right place, between 0 and 1.

    Args, errors: as `generate_answers`. `"answers"` hold symbols separated by blanks (`["4 8 2"]`); the best counts.
    """
    answers = generate_answers(
        model, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    return score_retrieval(answers, rows, seed)


def score_retrieval(generated: Sequence[str], rows: Sequence[dict], seed: int = 0) -> Score:
    """Retrieval accuracy of answers that were generated before, in row order."""
    pairs = zip(generated, (row["answers"] for row in rows), strict=True)
    per_row = [max(symbols_in_place(answer, gold) for gold in golds) for answer, golds in pairs]
    return Score.from_rows(per_row, "symbols right", seed)


def symbols_in_place(answer: str, gold: str) -> float:
    """Share of the blank-separated symbols of `gold` that `answer` has at the same place; what follows is ignored."""
    symbols, found = gold.split(), answer.split()
    if not symbols:
        return float(not found)
    return sum(a == b for a, b in zip(symbols, found, strict=False)) / len(symbols)
