"""The qa kind: which questions are trained on and which are held out, and their rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np

from data.duplicates import DistinctTexts, normal_form
from data.encoding import Encoder
from data.long_context import LongContexts, QuestionRow
from data.questions import Question, layout_of, read_questions, short_passages
from data.rows import EVALUATED, EVALUATION_NOT_CHOSEN, NOT_CHOSEN, Records, Rows, drawn
from data.settings import DataSettings
from data.sources.files import DataError
from lrsa import PromptFormat

_POOL = 8192  # passages that distractors come from: enough for rows of a million tokens, few enough to tokenize
_CHECKED = 16  # rows whose prompt is tokenized in one piece, to compare


def question_answering_rows(settings: DataSettings, tokenizer, seed: int, turn: PromptFormat, records: Records) -> Rows:
    """Rows of questions over long contexts.

    No passage that answers an evaluation row is in any training row, not even as a distractor. The distractors of
    evaluation rows come from all passages, for the held-out ones alone seldom fill a context.

    Raises:
        DataError: when the data cannot be read, or cannot be split.
    """
    result = Rows(source=settings.origin)
    passages = DistinctTexts()
    train, evaluation, fill = _read(settings, records, passages, result)
    contexts = LongContexts(
        Encoder(tokenizer), turn, settings.prompt_template, passages.texts, settings.context_length,
        settings.shuffle_passages, several=settings.questions_per_row > 1,
    )  # fmt: skip
    rng = np.random.default_rng([seed, 0])
    if evaluation is None:
        train, evaluation = _held_out(train, contexts, settings, rng, result)
    else:
        fitting = partial(contexts.fitting, dropped=result.evaluation_dropped)
        evaluation, more = drawn(evaluation, settings.eval_rows, rng, fitting)
        result.evaluation_dropped[EVALUATION_NOT_CHOSEN] += more
    held = {number for question in evaluation for number in question.gold}
    result.held = {normal_form(passages.texts[number]) for number in held}
    held |= {number for number, text in enumerate(passages.texts) if records.held and normal_form(text) in records.held}
    result.seen = {normal_form(text) for number, text in enumerate(passages.texts) if number not in held}
    train = _without(train, held, result)
    further = train if settings.questions_per_row > 1 else ()
    train, more = drawn(train, settings.max_rows, rng, partial(contexts.fitting, dropped=result.dropped))
    result.dropped[NOT_CHOSEN] += more

    pool = rng.permutation(len(passages.texts))[: _POOL if fill else 0]
    train_pool = np.asarray([number for number in pool.tolist() if number not in held], dtype=np.int64)
    train_rng = np.random.default_rng([seed, 1])
    result.train = contexts.rows(train, train_pool, train_rng, further, settings.questions_per_row)
    rows = contexts.rows(evaluation, pool, np.random.default_rng([seed, 2]))
    result.evaluation = [_evaluation_row(row, contexts) for row in rows]
    result.notes += _notes(contexts, (rows or result.train)[:_CHECKED]) + _passage_notes(result.train, passages, fill)
    return result


def _read(
    settings: DataSettings, records: Records, passages: DistinctTexts, result: Rows
) -> tuple[list[Question], list[Question] | None, bool]:
    """Questions to train on, those of an evaluation source of its own, and whether rows are filled from the pool."""
    columns = settings.columns
    first, evaluation = records.train[0], records.evaluation
    layout = layout_of(first, settings.format, columns)
    fill = settings.distractors == "pool"
    fill |= settings.distractors == "auto" and short_passages(first, layout, columns)
    train = read_questions(records.train, layout, columns, settings.source, passages, result.dropped, records.first)
    if evaluation is None:
        return train, None, fill
    layout, source = layout_of(evaluation[0], settings.format, columns), settings.evaluation_source
    return train, read_questions(evaluation, layout, columns, source, passages, result.evaluation_dropped), fill


def _held_out(
    questions: list[Question], contexts: LongContexts, settings: DataSettings, rng: np.random.Generator, result: Rows
) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and up to `eval_rows` that fit: all those of random passages, at most half of them."""
    if settings.eval_rows == 0 or not questions:
        return questions, []
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.gold[0], []).append(question)
    held: list[Question] = []
    for passage in rng.permutation(list(groups))[: len(groups) // 2].tolist():
        dropped: Counter = Counter()
        fitting = contexts.fitting(groups[passage], dropped)
        if fitting and len(held) + len(fitting) <= settings.eval_rows:
            held += fitting
            groups.pop(passage)
            result.evaluation_dropped.update(dropped)
        if len(held) == settings.eval_rows:
            break
    if not held:
        raise DataError(
            f"{settings.source}: no passage can be held out for data.eval_rows = {settings.eval_rows} "
            f"(questions: {len(questions)}, passages: {len(groups)}): all have more questions, or are longer than "
            f"data.context_length = {settings.context_length}. Change one of the two, give data.eval_path, or set "
            "data.eval_rows: 0."
        )
    return [question for group in groups.values() for question in group], held


def _without(questions: list[Question], held: set[int], result: Rows) -> list[Question]:
    """The questions that are on no held-out passage, without these passages as distractors."""
    kept = [question for question in questions if held.isdisjoint(question.gold)]
    result.dropped[EVALUATED] += len(questions) - len(kept)
    return [replace(one, own=tuple(number for number in one.own if number not in held)) for one in kept]


def _evaluation_row(row: QuestionRow, contexts: LongContexts) -> dict:
    return {
        "prompt": contexts.text(row),
        "answers": list(row.question.answers),
        "input_ids": row.input_ids.tolist(),
        "prompt_length": row.prompt_length,
    }


def _notes(contexts: LongContexts, rows: list[QuestionRow]) -> list[str]:
    different = sum(
        not np.array_equal(row.input_ids[: row.prompt_length], contexts.ids_in_one_piece(row)) for row in rows
    )
    notes = [] if contexts.turn.after else ["the tokenizer has no end-of-text token: the model is not taught to stop"]
    if different:
        notes.append(
            f"{different} of {len(rows)} prompts get other tokens when tokenized in one piece: "
            "passages are tokenized once and joined, in training and in evaluation"
        )
    return notes + contexts.encoder.notes()


def _passage_notes(rows: list[QuestionRow], passages: DistinctTexts, fill: bool) -> list[str]:
    """What was put into the rows beside their own passages, and in which order."""
    added = sum(len(set(row.passages) - {*row.question.gold, *row.question.own}) for row in rows) / max(len(rows), 1)
    if fill:
        notes = [f"{added:.1f} passages of other records are added to a row on average (data.distractors: pool)"]
    else:
        notes = ["a row holds the context of its own record only (data.distractors: none)"]
    if any(np.diff(row.trained, append=False).sum() > 2 for row in rows):
        asked = sum(np.diff(row.trained, append=False).sum() / 2 for row in rows) / len(rows)
        notes.append(f"a row to train on asks {asked:.1f} questions on average (data.questions_per_row)")
    if rows and all(row.question.pages and list(row.question.gold) == _in_row(row) for row in rows):
        notes.append("the texts of a context keep their order (data.shuffle_passages: false)")
    if passages.rewritten:
        notes.append(
            f"{passages.rewritten} passages differ from others in blanks, case or Unicode form alone: they are joined, "
            "so that none is trained on in one form and held out in another"
        )
    return notes


def _in_row(row: QuestionRow) -> list[int]:
    return [number for number in row.passages if number in row.question.gold]
