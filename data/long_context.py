"""Long contexts for questions: gold passages at random depths among other passages, each tokenized once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.encoding import Encoder
from data.progress import progress
from data.questions import Question
from data.rows import Row
from data.sources.files import DataError
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
    """Token ids of what every row of a question holds besides passages, and the tokens left for distractors.

    `again` asks the question behind the answer of another one; empty where rows ask one question.
    """

    head: np.ndarray
    tail: np.ndarray
    answer: np.ndarray
    again: np.ndarray
    room: int


class LongContexts:
    """Makes rows of at most `context_length` tokens from questions and numbered passages.

    The prompt is `template` with the passages as `{context}`, inside the tokenizer's chat template if it has one. The
    blank that follows `{context}` in the template also separates passages, and a passage has the token ids that it gets
    after this blank.

    Args:
        turn: what stands around the prompt and the answer.
        shuffle: whether the passages of a row are shuffled; None: unless they are pages, which stay together in order.
        several: whether rows may ask several questions, one after the other.

    Raises:
        DataError: when rows may ask several questions, and a template cannot.
    """

    def __init__(
        self,
        encoder: Encoder,
        turn: PromptFormat,
        template: str,
        passages: Sequence[str],
        context_length: int,
        shuffle: bool | None,
        several: bool = False,
    ):
        self.encoder, self.passages, self.context_length = encoder, passages, context_length
        self.shuffle, self.several = shuffle, several
        self.turn = turn
        head, after_context = template.split("{context}")
        tail = after_context.lstrip()
        self.separator = after_context[: len(after_context) - len(tail)]
        self.head, self.tail = encoder.markup(self.turn.before + head), encoder.markup(tail + self.turn.between)
        self.again = ""
        if several:
            if "{question}" in head:
                raise DataError(
                    "data.prompt_template asks before the passages, so that a row cannot ask again: put {question} "
                    "behind {context}, or set data.questions_per_row: 1."
                )
            try:
                following = turn.next_turn(encoder.tokenizer, self.separator)
            except ValueError as error:
                text = "set data.questions_per_row: 1, or model.chat_template to a file that writes all turns alike."
                raise DataError(f"{error} To ask several questions of a row it must: {text}") from error
            self.again = encoder.markup(following) + self.tail
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
        asked = [self.again.replace("{question}", question.text) for question in questions]
        _, again_ids = self.encoder.continued([after * self.several] * len(asked), asked)
        found = []
        for question, head, *ids in zip(questions, heads, tail_ids, answer_ids, again_ids, strict=True):
            tail, answer, again = ids
            needed = len(head_ids[head]) + len(tail) + len(answer) + sum(len(self.ids[n]) for n in question.gold)
            found.append(Pieces(head_ids[head], tail, answer, again, self.context_length - needed))
        return found

    def fitting(self, questions: Sequence[Question], dropped: Counter) -> list[Question]:
        """The questions whose row fits without distractors; the others are counted in `dropped`."""
        found = [question for question, pieces in self._with_pieces(questions) if pieces.room >= 0]
        dropped[TOO_LONG] += len(questions) - len(found)
        return found

    def rows(
        self,
        questions: Sequence[Question],
        pool: np.ndarray,
        rng: np.random.Generator,
        further: Sequence[Question] = (),
        most: int = 1,
    ) -> list[QuestionRow]:
        """One row per question, all of which fit, filled with distractors; the answer is never cut.

        A question's own distractors come first, then passages of `pool` (their numbers) in random order, each at most
        once, as long as they fit whole. Then the passages are shuffled, or the gold ones put among the others in order.

        Args:
            further, most: a row asks up to `most` questions, all but its own drawn from `further`; they are about its
                passages.
        """
        self.tokenize([*pool.tolist(), *(number for question in questions for number in question.own)])
        more, found = _Further(list(self._with_pieces(further)), most - 1), []
        for question, pieces in progress(self._with_pieces(questions), "building rows", total=len(questions)):
            room = pieces.room
            others = self._distractors(question, pool, max(room - more.tokens, 0), rng)
            room -= sum(len(self.ids[number]) for number in others)
            asked = more.about(question, [*question.gold, *others], room, rng)
            if further:
                room -= sum(len(again.again) + len(again.answer) for _, again in asked)
                others += self._distractors(question, pool, room, rng, besides=others)
            if not question.pages if self.shuffle is None else self.shuffle:
                order = [*question.gold, *others]
                rng.shuffle(order)
            else:
                place = int(rng.integers(len(others) + 1))
                order = [*others[:place], *question.gold, *others[place:]]
            self.encoder.count(
                text for one in (question, *(q for q, _ in asked)) for text in (one.text, one.answers[0])
            )
            prompt = np.concatenate([pieces.head, *(self.ids[number] for number in order), pieces.tail])
            parts = [prompt, pieces.answer, *(ids for _, again in asked for ids in (again.again, again.answer))]
            ids, lengths = np.concatenate(parts), [len(part) for part in parts]
            assert len(ids) <= self.context_length
            answers = np.repeat(np.arange(len(parts)) % 2 == 1, lengths)
            found.append(QuestionRow(ids, len(prompt), question, tuple(order), answers=answers))
        return found

    def _with_pieces(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Pieces]]:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            yield from zip(batch, self.pieces(batch), strict=True)

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

    def _distractors(
        self, question: Question, pool: np.ndarray, room: int, rng: np.random.Generator, besides: Sequence[int] = ()
    ) -> list[int]:
        """Passages that fill `room` tokens as far as whole passages can, others than those that are there already."""
        chosen, misses, seen = [], 0, {*question.gold, *besides}
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


class _Further:
    """Further questions of a row, each about passages that are in it.

    Attributes:
        tokens: what `most` of them take on average, to be left free of distractors.
    """

    def __init__(self, entries: Sequence[tuple[Question, Pieces]], most: int):
        self.most, self._about = most, defaultdict(list)
        for question, pieces in entries:
            self._about[question.gold[0]].append((question, pieces))
        lengths = [len(pieces.again) + len(pieces.answer) for _, pieces in entries]
        self.tokens = most * round(sum(lengths) / max(len(lengths), 1))

    def about(
        self, first: Question, passages: Sequence[int], room: int, rng: np.random.Generator
    ) -> list[tuple[Question, Pieces]]:
        """In random order, as many as fit into `room` tokens; none is asked twice, whatever its answers."""
        present, texts, chosen = set(passages), {first.text}, []
        candidates = [entry for number in passages for entry in self._about[number]] if self.most else []
        for place in rng.permutation(len(candidates)) if candidates else ():
            question, pieces = candidates[place]
            length = len(pieces.again) + len(pieces.answer)
            new = question.text not in texts and present.issuperset(question.gold)
            if new and len(chosen) < self.most and length <= room:
                chosen.append(candidates[place])
                texts.add(question.text)
                room -= length
        return chosen
