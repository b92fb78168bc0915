"""The synthetic kind: generated retrieval tasks as rows, with the same chat template and answer ending as questions."""

from __future__ import annotations

import random

import numpy as np

from data import synthetic
from data.progress import progress
from data.prompt import continued_ids, turn_of
from data.reading import DataError
from data.rows import Row, Rows
from data.settings import DataSettings


def synthetic_rows(settings: DataSettings, tokenizer, seed: int) -> Rows:
    """Generated rows, as near below `context_length` as whole words allow.

    Raises:
        DataError: when `context_length` is too short for the facts and the question.
    """
    task = settings.synthetic
    count = min(task.rows, settings.max_rows or task.rows)
    result = Rows(source=f"synthetic {task.task}")
    result.train = [row for row, _ in _rows(settings, tokenizer, count, random.Random(f"{seed} train"))]
    evaluation = _rows(settings, tokenizer, settings.eval_rows, random.Random(f"{seed} evaluation"))
    result.evaluation = [
        {**example, "input_ids": row.input_ids.tolist(), "prompt_length": row.prompt_length}
        for row, example in evaluation
    ]
    return result


def _rows(settings: DataSettings, tokenizer, count: int, rng: random.Random) -> list[tuple[Row, dict]]:
    """Rows and what they were made from: the prompt with everything around it, and its answers."""
    task, turn = settings.synthetic, turn_of(tokenizer)
    around = sum(
        len(ids[0])
        for ids in continued_ids(tokenizer, [f"{turn.before}a{turn.between}"], [f"{turn.lead}a{turn.after}"])
    )
    room = settings.context_length - (
        around - len(tokenizer("a a")["input_ids"]) - 1
    )  # the generator counts one end token
    rows = []
    for _ in progress(range(count), "generating rows"):
        try:
            if task.task == "key_value":
                made = synthetic.key_value_row(rng, tokenizer, room, keys=task.keys, digits=task.digits)
            else:
                made = synthetic.passkey_row(rng, tokenizer, room, digits=task.digits)
        except ValueError as error:
            raise DataError(f"data.synthetic: {error}") from error
        prompt = turn.before + made["prompt"] + turn.between
        answer = turn.lead + made["answers"][0] + turn.after
        prompt_ids, answer_ids = (ids[0] for ids in continued_ids(tokenizer, [prompt], [answer]))
        row = Row(np.concatenate([prompt_ids, answer_ids]), len(prompt_ids))
        assert len(row.input_ids) <= settings.context_length
        rows.append((row, {"prompt": prompt, "answers": made["answers"]}))
    return rows
