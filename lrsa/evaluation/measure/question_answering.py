"""Answer F1 and exact match as SQuAD defines them, on generated answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lrsa.evaluation.measure.generation import generate_answers
from lrsa.evaluation.score import Score


def evaluate_question_answering(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
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

    Only the first line counts: a model that was not trained to stop runs on, and correct answers hold no line breaks.
    """
    firsts = [answer.strip().partition("\n")[0] for answer in generated]
    pairs = list(zip(firsts, (row["answers"] for row in rows), strict=True))
    return {
        "f1": Score.from_rows([max(f1(answer, gold) for gold in golds) for answer, golds in pairs], "F1", seed),
        "exact_match": Score.from_rows(
            [max(exact_match(answer, gold) for gold in golds) for answer, golds in pairs], "exact match", seed
        ),
    }


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and extra blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> float:
    """1 when both have the same normal form, else 0."""
    return float(normalize(answer) == normalize(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms, repeated words counted."""
    words, gold_words = normalize(answer).split(), normalize(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * common / (len(words) + len(gold_words))
