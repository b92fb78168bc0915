"""Questions with their passages, read from SQuAD, HotpotQA and plain question/context/answers records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.duplicates import DistinctTexts
from data.sources.columns import columns_of
from data.sources.files import DataError

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
    `pages` says that the gold passages are a list without titles, whose order may carry meaning.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    own: tuple[int, ...] = ()
    pages: bool = False


def read_questions(
    records: list[dict[str, Any]],
    layout: str,
    columns: dict[str, str],
    source: str,
    passages: DistinctTexts,
    dropped: Counter,
    first: int = 0,
) -> list[Question]:
    """The questions of `records`; passages get numbers in `passages`, left-out questions are counted in `dropped`.

    Args:
        layout: squad, hotpotqa or generic, from `layout_of`.
        source: what error messages call the records, whose numbers begin at `first`.

    Raises:
        DataError: a missing column, or a record that does not fit the layout.
    """
    if layout == "squad" and columns:
        told = ", ".join(columns)
        raise DataError(
            f"{source}: data.columns {told}: articles in SQuAD's layout have no such columns: leave it out."
        )
    names = [] if layout == "squad" else columns_of(records, ("question", "context", "answers"), columns, source, "qa")
    entries_of = {"squad": _squad, "hotpotqa": _hotpotqa, "generic": _generic}[layout]
    found = []
    for number, record in enumerate(records, first):
        try:
            entries = [
                (_text(question, "question"), _clean(gold, "context"), _clean(own, "context"), _clean(said, "answer"))
                for question, gold, own, said in entries_of(record, names)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error if type(error) is ValueError else "a field is missing, or holds something else"
            raise DataError(
                f"{source}: record {number} does not fit data.format {layout}, which expects {EXPECTED[layout]}: "
                f"{reason}. The record: {str(record)[:200]}"
            ) from error
        pages = layout == "generic" and isinstance(record[names[1]], list)
        for question, gold, own, answers in entries:
            reason = NO_QUESTION if not question else NO_CONTEXT if not gold else NO_ANSWER if not answers else None
            if reason:
                dropped[reason] += 1
            else:
                gold_ids, own_ids = (tuple(dict.fromkeys(map(passages.number, texts))) for texts in (gold, own))
                own_ids = tuple(number for number in own_ids if number not in gold_ids)
                found.append(Question(question, answers, gold_ids, own_ids, pages))
    return found


def layout_of(record: dict[str, Any], layout: str, columns: dict[str, str]) -> str:
    """The layout of `record`; auto looks at it. The Hub's squad is generic: one record per question.

    Args:
        layout: auto, squad, hotpotqa or generic, as in `DataSettings.format`.
    """
    if layout == "squad" and "paragraphs" not in record:
        return "generic"
    if layout != "auto":
        return layout
    context = record.get(columns.get("context", "context"))
    titled = isinstance(context, dict) and {"title", "sentences"} <= set(context)
    listed = isinstance(context, list) and bool(context) and isinstance(context[0], list)
    return "squad" if "paragraphs" in record else "hotpotqa" if titled or listed else "generic"


def short_passages(record: dict[str, Any], layout: str, columns: dict[str, str]) -> bool:
    """Whether the context of a record is a passage among many, as in SQuAD and HotpotQA, and no document of its own."""
    return layout in ("squad", "hotpotqa") or isinstance(record.get(columns.get("answers", "answers")), dict)


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
    yield question, _listed(context), [], _answers(answers)


def _answers(value: Any) -> list:
    return _listed(value["text"] if isinstance(value, dict) else value)


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _clean(values: list, what: str) -> tuple[str, ...]:
    """Stripped texts, without empty ones, each once, in order."""
    return tuple(dict.fromkeys(stripped for value in values if (stripped := _text(value, what))))


def _text(value: Any, what: str) -> str:
    """The stripped text of a field; a whole number is the text that it is written as.

    Raises:
        ValueError: for anything else that is not text: 3.10 and true can be written in several ways.
    """
    if value is None and what == "question":
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = {bool: "true or false", float: "a number with a fraction", dict: "a mapping", list: "a list"}
        text = f"the {what} {value!r} is {kind.get(type(value), 'no text')}"
        raise ValueError(f'{text}; write it as text, in quotes, as the model shall answer or read it ("yes", "3.10")')
    return value.strip()
