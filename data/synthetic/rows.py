"""The synthetic kind: generated retrieval tasks as rows, with the same chat template and answer ending as questions."""

from __future__ import annotations

import random

import numpy as np

from data.encoding import Encoder
from data.progress import progress
from data.rows import Records, Row, Rows
from data.settings import DataSettings
from data.sources.files import DataError
from data.synthetic import text as synthetic
from lrsa import PromptFormat


def synthetic_rows(settings: DataSettings, tokenizer, seed: int, turn: PromptFormat, records: Records) -> Rows:
    """Generated rows, as near below `context_length` as whole words allow.

    Raises:
        DataError: when `context_length` is too short for the facts and the question.
    """
    task = settings.synthetic
    count = min(task.rows, settings.max_rows or task.rows)
    result = Rows(source=settings.origin)
    training = _rows(settings, tokenizer, turn, count, random.Random(f"{seed} train"), task.questions)
    result.train = [row for row, _ in training]
    evaluation = _rows(settings, tokenizer, turn, settings.eval_rows, random.Random(f"{seed} evaluation"), questions=1)
    result.evaluation = [
        {**example, "input_ids": row.input_ids.tolist(), "prompt_length": row.prompt_length}
        for row, example in evaluation
    ]
    return result


def _rows(
    settings: DataSettings, tokenizer, turn: PromptFormat, count: int, rng: random.Random, questions: int
) -> list[tuple[Row, dict]]:
    """Rows and what they were made from: the prompt with everything around it, and its answers."""
    encoder = Encoder(tokenizer)
    room, rows = settings.context_length, []
    for _ in progress(range(count), "generating rows"):
        while True:
            made = _made(settings, tokenizer, room, rng, questions)
            prompt = encoder.markup(turn.before) + made["prompt"] + encoder.markup(turn.between)
            texts = [turn.lead + made["answers"][0]]
            for question, answer in made.get("more", []):
                texts += [f" {question}", f" {answer}"]
            texts[-1] += encoder.markup(turn.after)
            row = _row(encoder, prompt, texts)
            excess = len(row.input_ids) - settings.context_length
            if excess <= 0:
                break
            room -= excess  # the generator does not know BOS and chat markup: leave room for them from now on
        rows.append((row, {"prompt": encoder.plain(prompt), "answers": made["answers"]}))
    return rows


def _row(encoder: Encoder, prompt: str, texts: list[str]) -> Row:
    """The prompt, then trained texts with untrained ones between them."""
    parts, trained = [], []
    for number, text in enumerate(texts):
        [before], [added] = encoder.continued([prompt + "".join(texts[:number])], [text])
        parts += [before, added] if number == 0 else [added]
        trained.append(np.full(len(added), number % 2 == 0))
    answers = np.concatenate([np.zeros(len(parts[0]), dtype=bool), *trained])
    return Row(np.concatenate(parts), len(parts[0]), answers=answers if len(texts) > 1 else None)


def _made(settings: DataSettings, tokenizer, room: int, rng: random.Random, questions: int) -> dict:
    task = settings.synthetic
    try:
        if task.task == "key_value":
            return synthetic.key_value_row(
                rng, tokenizer, room, keys=task.keys, digits=task.digits, questions=questions
            )
        return synthetic.passkey_row(rng, tokenizer, room, digits=task.digits)
    except ValueError as error:
        raise DataError(f"data.synthetic: {error}") from error
