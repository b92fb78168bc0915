"""Long contexts for questions: gold passages at random depths among other passages, each tokenized once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.encoding import Encoder
from data.progress import progress
from data.questions import Question
from data.rows import Row
from lrsa import PromptFormat

TOO_LONG = "gold passage, question and answer are longer than context_length"
_MISSES = 32  # passages that did not fit before a row counts as full
_BATCH = 256


@dataclass(frozen=True)
class QuestionRow(Row):
    """A row and what it was made of: the question, and its passages in order."""

    question: Question
    passages: tuple[int, ...]


class Pieces(NamedTuple):
    """Token ids of what every row of a question holds besides passages, and the tokens left for distractors."""

    head: np.ndarray
    tail: np.ndarray
    answer: np.ndarray
    room: int


class LongContexts:
    """Makes rows of at most `context_length` tokens from questions and numbered passages.

    The prompt is `template` with the passages as `{context}`, inside the tokenizer's chat template if it has one. The
    blank that follows `{context}` in the template also separates passages, and a passage has the token ids that it gets
    after this blank.

    Args:
        turn: what stands around the prompt and the answer.
        shuffle: whether the passages of a row are shuffled; None: unless they are pages, which stay together in order.
    """

    def __init__(
        self,
        encoder: Encoder,
        turn: PromptFormat,
        template: str,
        passages: Sequence[str],
        context_length: int,
        shuffle: bool | None,
    ):
        self.encoder, self.passages, self.context_length = encoder, passages, context_length
        self.shuffle = shuffle
        self.turn = turn
        head, after_context = template.split("{context}")
        tail = after_context.lstrip()
        self.separator = after_context[: len(after_context) - len(tail)]
        self.head, self.tail = encoder.markup(self.turn.before + head), encoder.markup(tail + self.turn.between)
        self.ids: dict[int, np.ndarray] = {}

    def tokenize(self, numbers: Iterable[int]) -> None:
        """Make the token ids of these passages, as far as they are not there yet."""
        new = sorted(set(numbers) - self.ids.keys())
        batches = [new[start : start + _BATCH] for start in range(0, len(new), _BATCH)]
        for batch in progress(batches, "tokenizing passages"):
            texts = [self.passages[number] + self.separator for number in batch]
            _, ids = self.encoder.continued([self.separator] * len(batch), texts)
            self.encoder.count(texts)
            self.ids.update(zip(batch, ids, strict=True))

    def pieces(self, questions: Sequence[Question]) -> list[Pieces]:
        """The pieces of each question; where `room` is negative, the question does not fit."""
        self.tokenize(number for question in questions for number in question.gold)
        heads, tails = zip(*(self._around(question) for question in questions), strict=True)
        distinct = list(dict.fromkeys(heads))
        head_ids = dict(zip(distinct, self.encoder.ids(distinct), strict=True))
        _, tail_ids = self.encoder.continued([self.separator] * len(tails), tails)
        after = self.encoder.markup(self.turn.after)
        answers = [self.turn.lead + question.answers[0] + after for question in questions]
        _, answer_ids = self.encoder.continued(tails, answers)
        found = []
        for question, head, tail, answer in zip(questions, heads, tail_ids, answer_ids, strict=True):
            needed = len(head_ids[head]) + len(tail) + len(answer) + sum(len(self.ids[n]) for n in question.gold)
            found.append(Pieces(head_ids[head], tail, answer, self.context_length - needed))
        return found

    def fitting(self, questions: Sequence[Question], dropped: Counter) -> list[Question]:
        """The questions whose row fits without distractors; the others are counted in `dropped`."""
        batches = [questions[start : start + _BATCH] for start in range(0, len(questions), _BATCH)]
        rooms = [pieces.room for batch in batches for pieces in self.pieces(batch)]
        found = [question for question, room in zip(questions, rooms, strict=True) if room >= 0]
        dropped[TOO_LONG] += len(questions) - len(found)
        return found

    def rows(self, questions: Sequence[Question], pool: np.ndarray, rng: np.random.Generator) -> list[QuestionRow]:
        """One row per question, all of which fit, filled with distractors; the answer is never cut.

        A question's own distractors come first, then passages of `pool` (their numbers) in random order, each at most
        once, as long as they fit whole. Then the passages are shuffled, or the gold ones put among the others in order.
        """
        self.tokenize([*pool.tolist(), *(number for question in questions for number in question.own)])
        self.encoder.count(text for question in questions for text in (question.text, question.answers[0]))
        batches = [questions[start : start + _BATCH] for start in range(0, len(questions), _BATCH)]
        entries = (entry for batch in batches for entry in zip(batch, self.pieces(batch), strict=True))
        found = []
        for question, pieces in progress(entries, "building rows", total=len(questions)):
            others = self._distractors(question, pool, pieces.room, rng)
            if not question.pages if self.shuffle is None else self.shuffle:
                order = [*question.gold, *others]
                rng.shuffle(order)
            else:
                place = int(rng.integers(len(others) + 1))
                order = [*others[:place], *question.gold, *others[place:]]
            ids = np.concatenate([pieces.head, *(self.ids[number] for number in order), pieces.tail, pieces.answer])
            assert len(ids) <= self.context_length
            found.append(QuestionRow(ids, len(ids) - len(pieces.answer), question, tuple(order)))
        return found

    def text(self, row: QuestionRow) -> str:
        """The prompt of a row as text: what the row's prompt ids are made of, BOS or chat markup included."""
        head, tail = self._around(row.question)
        whole = head + "".join(self.passages[number] + self.separator for number in row.passages) + tail
        return self.encoder.plain(whole)

    def ids_in_one_piece(self, row: QuestionRow) -> np.ndarray:
        """Token ids of a row's prompt when it is tokenized as a whole."""
        head, tail = self._around(row.question)
        passages = "".join(self.passages[number] + self.separator for number in row.passages)
        return self.encoder.ids([head + passages + tail])[0]

    def _around(self, question: Question) -> tuple[str, str]:
        return self.head.replace("{question}", question.text), self.tail.replace("{question}", question.text)

    def _distractors(self, question: Question, pool: np.ndarray, room: int, rng: np.random.Generator) -> list[int]:
        """Passages that fill `room` tokens as far as whole passages can."""
        chosen, misses, seen = [], 0, set(question.gold)
        for number in rng.permutation(question.own).tolist() + rng.permutation(pool).tolist():
            length = len(self.ids[number])
            if number in seen:
                continue
            if length <= room:
                chosen.append(number)
                seen.add(number)
                room -= length
            else:
                misses += 1
                if misses == _MISSES:
                    break
        return chosen
