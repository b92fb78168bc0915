"""Questions with their passages, read from SQuAD, HotpotQA and plain question/context/answers records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.reading import DataError, column

NO_ANSWER = "no answer is given (unanswerable)"
NO_QUESTION = "no question is given"
NO_CONTEXT = "no passage is given"

EXPECTED = {
    "squad": "articles {paragraphs: [{context, qas: [{question, answers: [{text}]}]}]}",
    "hotpotqa": "question, answer, context {title: [...], sentences: [[...]]} and supporting_facts {title: [...]}",
    "generic": "question (text), context (text or list of texts), answers (text, list of texts, or {text: [...]})",
}


@dataclass(frozen=True)
class Question:
    """A question, the answers that count as right, and its passages by number.

    `gold` passages hold the answer and are always in the row; `own` are distractors that came with the question.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    own: tuple[int, ...] = ()


def read_questions(
    records: list[dict[str, Any]],
    layout: str,
    columns: dict[str, str],
    source: str,
    passages: dict[str, int],
    dropped: Counter,
) -> list[Question]:
    """The questions of `records`; passages get numbers in `passages`, left-out questions are counted in `dropped`.

    Args:
        layout: auto, squad, hotpotqa or generic, as in `DataSettings.format`.
        source: what error messages call the records.

    Raises:
        DataError: a missing column, or a record that does not fit the layout.
    """
    layout = _layout(records[0], layout, columns)
    names = (
        ()
        if layout == "squad"
        else [column(records, ours, columns, source) for ours in ("question", "context", "answers")]
    )
    entries_of = {"squad": _squad, "hotpotqa": _hotpotqa, "generic": _generic}[layout]
    found = []
    for number, record in enumerate(records):
        try:
            entries = [
                (q.strip(), _clean(gold), _clean(own), _clean(a)) for q, gold, own, a in entries_of(record, names)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{source}: record {number} does not fit data.format {layout}, which expects "
                f"{EXPECTED[layout]}: {type(error).__name__} {error}."
            ) from error
        for question, gold, own, answers in entries:
            reason = NO_QUESTION if not question else NO_CONTEXT if not gold else NO_ANSWER if not answers else None
            if reason:
                dropped[reason] += 1
            else:
                gold_ids, own_ids = (
                    tuple(passages.setdefault(t, len(passages)) for t in texts) for texts in (gold, own)
                )
                found.append(Question(question, answers, gold_ids, own_ids))
    return found


def _layout(record: dict[str, Any], layout: str, columns: dict[str, str]) -> str:
    """The layout of `record`. The Hub's squad is generic: one record per question, answers as {"text": [...]}."""
    if layout == "squad" and "paragraphs" not in record:
        return "generic"
    if layout != "auto":
        return layout
    context = record.get(columns.get("context", "context"))
    titled = isinstance(context, dict) and {"title", "sentences"} <= set(context)
    listed = isinstance(context, list) and bool(context) and isinstance(context[0], list)
    return "squad" if "paragraphs" in record else "hotpotqa" if titled or listed else "generic"


Entry = tuple[str, list[str], list[str], list[str]]  # question, gold passages, other passages, answers


def _squad(article: dict[str, Any], names) -> Iterator[Entry]:
    for paragraph in article["paragraphs"]:
        for qa in paragraph["qas"]:
            answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
            yield qa["question"], [paragraph["context"]], [], answers


def _hotpotqa(record: dict[str, Any], names) -> Iterator[Entry]:
    """Ten titled passages per record, in the Hub's layout or the original one; supporting_facts names the gold ones."""
    question, context, answers = (record[name] for name in names)
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    titled = [(title, f"{title}\n{' '.join(sentence.strip() for sentence in sentences)}") for title, sentences in pairs]
    facts = record.get("supporting_facts") or []
    named = set(facts["title"] if isinstance(facts, dict) else [title for title, _ in facts])
    gold = [text for title, text in titled if title in named or not named]
    yield question, gold, [text for title, text in titled if named and title not in named], _answers(answers)


def _generic(record: dict[str, Any], names) -> Iterator[Entry]:
    question, context, answers = (record[name] for name in names)
    yield question or "", [context] if isinstance(context, str) else list(context or ()), [], _answers(answers)


def _answers(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value["text"]
    return [value] if isinstance(value, str) else list(value or ())


def _clean(texts: list[str]) -> tuple[str, ...]:
    """Stripped, without empty ones, each once, in order."""
    return tuple(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))
