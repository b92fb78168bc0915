"""Answer F1 and exact match of generated answers, as SQuAD defines them over words."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence

from lrsa.evaluation.measure.generation import generate_answers
from lrsa.evaluation.measure.normal_forms import rule_for, words
from lrsa.evaluation.score import Score


def evaluate_question_answering(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[list[int], list], object] | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """Mean F1 and exact match of greedy answers, `{"f1": Score, "exact_match": Score}`, each between 0 and 1.

    Args, errors: as `generate_answers`. Every row needs `"answers"`; the best of them counts.
    """
    answers = generate_answers(
        model, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    return score_question_answering(answers, rows, seed)


def score_question_answering(generated: Sequence[str], rows: Sequence[dict], seed: int = 0) -> dict[str, Score]:
    """F1 and exact match of answers that were generated before, in row order.

    A correct answer of one line is compared with the first line alone: a model that was not trained to stop runs on.
    """
    pairs = list(zip(generated, (row["answers"] for row in rows), strict=True))
    return {
        "f1": Score.from_rows([max(f1(answer, gold) for gold in golds) for answer, golds in pairs], "F1", seed),
        "exact_match": Score.from_rows(
            [max(exact_match(answer, gold) for gold in golds) for answer, golds in pairs], "exact match", seed
        ),
    }


def exact_match(answer: str, gold: str) -> float:
    """1 when both have the same words, else 0."""
    return float(operator.eq(*_words(answer, gold)))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of both, repeated words counted."""
    answer_words, gold_words = _words(answer, gold)
    if not answer_words or not gold_words:
        return float(answer_words == gold_words)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words))


def _words(answer: str, gold: str) -> tuple[list[str], list[str]]:
    answer, gold = answer.strip(), gold.strip()
    if "\n" not in gold:
        answer = answer.partition("\n")[0]
    rule = rule_for(answer, gold)
    return words(answer, rule), words(gold, rule)
