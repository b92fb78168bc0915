"""The qa kind: which questions are trained on and which are held out, and their rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.long_context import TOO_LONG, LongContexts, QuestionRow
from data.prompt import token_ids
from data.questions import Question, read_questions
from data.reading import DataError, evaluation_source, read_evaluation_records, read_records
from data.rows import EVALUATED, NOT_CHOSEN, Rows, chosen
from data.settings import DataSettings

_POOL = 8192  # passages that distractors come from: enough for rows of a million tokens, few enough to tokenize
_CHECKED = 16  # rows whose prompt is tokenized in one piece, to compare


def question_answering_rows(settings: DataSettings, tokenizer, seed: int) -> Rows:
    """Rows of questions over long contexts.

    No passage that answers an evaluation row is in any training row, not even as a distractor. The distractors of
    evaluation rows come from all passages, for the held-out ones alone seldom fill a context.

    Raises:
        DataError: when the data cannot be read, or cannot be split.
    """
    result = Rows(source=settings.path)
    numbers: dict[str, int] = {}
    train, evaluation = _read(settings, numbers, result)
    contexts = LongContexts(tokenizer, settings.prompt_template, list(numbers), settings.context_length)
    rng = np.random.default_rng([seed, 0])
    if evaluation is None:
        train, evaluation = _held_out(train, contexts, settings, rng, result)
    else:
        evaluation = [evaluation[index] for index in chosen(len(evaluation), settings.eval_rows, rng)]
    held = {number for question in evaluation for number in question.gold}
    train = _without(train, held, settings.max_rows, rng, result)

    pool = rng.permutation(len(numbers))[:_POOL]
    train_pool = np.asarray([number for number in pool.tolist() if number not in held], dtype=np.int64)
    result.train = contexts.rows(train, train_pool, np.random.default_rng([seed, 1]), result.dropped)
    rows = contexts.rows(evaluation, pool, np.random.default_rng([seed, 2]), result.evaluation_dropped)
    result.evaluation = [_evaluation_row(row, contexts) for row in rows]
    result.notes += _notes(contexts, (rows or result.train)[:_CHECKED])
    return result


def _read(
    settings: DataSettings, numbers: dict[str, int], result: Rows
) -> tuple[list[Question], list[Question] | None]:
    """All questions to train on, and those of an evaluation source of its own; `numbers` gets the passages."""
    layout, columns = settings.format, settings.columns
    records = read_records(settings.path, settings.name, settings.split)
    train = read_questions(records, layout, columns, f"data.path {settings.path}", numbers, result.dropped)
    records = read_evaluation_records(settings)
    if records is None:
        return train, None
    source = evaluation_source(settings)
    return train, read_questions(records, layout, columns, source, numbers, result.evaluation_dropped)


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
        pairs = zip(groups[passage], contexts.pieces(groups[passage]), strict=True)
        fitting = [question for question, pieces in pairs if pieces.room >= 0]
        if fitting and len(held) + len(fitting) <= settings.eval_rows:
            held += fitting
            result.evaluation_dropped[TOO_LONG] += len(groups.pop(passage)) - len(fitting)
        if len(held) == settings.eval_rows:
            break
    if not held:
        raise DataError(
            f"data.path {settings.path}: no passage can be held out for data.eval_rows = {settings.eval_rows} "
            f"(questions: {len(questions)}, passages: {len(groups)}): all have more questions, or are longer than "
            f"data.context_length = {settings.context_length}. Change one of the two, give data.eval_path, or set "
            "data.eval_rows: 0."
        )
    return [question for group in groups.values() for question in group], held


def _without(
    questions: list[Question], held: set[int], most: int | None, rng: np.random.Generator, result: Rows
) -> list[Question]:
    """At most `most` questions, without those on held-out passages, and without these passages as distractors."""
    kept = [question for question in questions if held.isdisjoint(question.gold)]
    result.dropped[EVALUATED] += len(questions) - len(kept)
    indices = chosen(len(kept), most, rng)
    result.dropped[NOT_CHOSEN] += len(kept) - len(indices)
    return [replace(kept[i], own=tuple(number for number in kept[i].own if number not in held)) for i in indices]


def _evaluation_row(row: QuestionRow, contexts: LongContexts) -> dict:
    return {
        "prompt": contexts.text(row),
        "answers": list(row.question.answers),
        "input_ids": row.input_ids.tolist(),
        "prompt_length": row.prompt_length,
    }


def _notes(contexts: LongContexts, rows: list[QuestionRow]) -> list[str]:
    whole = token_ids(contexts.tokenizer, [contexts.text(row) for row in rows])
    pairs = zip(rows, whole, strict=True)
    different = sum(not np.array_equal(row.input_ids[: row.prompt_length], ids) for row, ids in pairs)
    notes = [] if contexts.turn.after else ["the tokenizer has no end-of-text token: the model is not taught to stop"]
    if different:
        notes.append(
            f"{different} of {len(rows)} prompts get other tokens when tokenized in one piece: "
            "passages are tokenized once and joined, in training and in evaluation"
        )
    return notes
