"""From the `data` section of a run to tokenized training rows, evaluation rows, and the report on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import datasets
import numpy as np

from data.chat.rows import chat_rows
from data.question_answering import question_answering_rows
from data.report import DataReport, compression_warning, length_summary, marked_sample
from data.rows import Rows, fingerprint, to_dataset
from data.settings import DataSettings
from data.sources.files import DataError
from data.sources.records import training_and_evaluation
from data.synthetic.rows import synthetic_rows
from data.text import text_rows
from lrsa import PromptFormat

MAKE = {"qa": question_answering_rows, "chat": chat_rows, "text": text_rows, "synthetic": synthetic_rows}


@dataclass(frozen=True)
class Corpus:
    """Rows of a run.

    Attributes:
        train: columns `input_ids` and `labels` (-100: token not trained); at most `context_length` tokens a row.
        evaluation: for qa and synthetic `{"prompt", "answers", "input_ids", "prompt_length"}`, where
            `input_ids[:prompt_length]` is the prompt as training rows have it (BOS or chat template included) and
            the rest the first answer with its end; for text `{"input_ids"}`; for chat also `trained`, of every token,
            and no `answers` where the last one is long.
        report: what the rows look like.
        prompt: what stands around prompts and answers of these rows.
    """

    train: datasets.Dataset
    evaluation: list[dict]
    report: DataReport
    prompt: PromptFormat


def load(settings: DataSettings, tokenizer, seed: int, smallest_compressed: int) -> Corpus:
    """Read or generate the data of a run and make its rows; the same arguments give the same rows on every process.

    Args:
        tokenizer: of the model that is trained.
        seed: decides what is held out, which distractors a row gets and where they go.
        smallest_compressed: `sink_size + 2 * lag_size`; rows up to this length are never compressed (for the report).

    Raises:
        DataError: data that is missing, empty, or not in the layout that the settings say; it says what to change.
    """
    prompt = prompt_format(settings, tokenizer)
    notes: list[str] = []
    rows = MAKE[settings.kind](settings, tokenizer, seed, prompt, training_and_evaluation(settings, notes))
    rows.notes[:0] = notes
    if not rows.train:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in _counted(rows.dropped).items())
        raise DataError(f"data: {rows.source} leaves no row to train on. Dropped: {reasons or 'nothing'}.")
    if settings.eval_rows and not rows.evaluation:
        raise DataError(
            f"data: {rows.source} leaves no row to evaluate on: give data.eval_path, or set data.eval_rows: 0."
        )
    if len(rows.evaluation) < settings.eval_rows:
        rows.notes.append(
            f"{len(rows.evaluation)} evaluation rows could be had, of data.eval_rows = {settings.eval_rows}"
        )
    report = _report(rows, settings, tokenizer, smallest_compressed)
    return Corpus(to_dataset(rows.train), rows.evaluation, report, rows.prompt or prompt)


def prompt_format(settings: DataSettings, tokenizer) -> PromptFormat:
    """What stands around prompts and answers: that of the chat template, but for text, where no one is asked.

    Raises:
        DataError: when the chat template cannot be used.
    """
    try:
        return PromptFormat.plain(tokenizer) if settings.kind == "text" else PromptFormat.of(tokenizer)
    except ValueError as error:
        raise DataError(f"data.kind {settings.kind}: {error}") from error


def _report(rows: Rows, settings: DataSettings, tokenizer, smallest_compressed: int) -> DataReport:
    lengths = [len(row.input_ids) for row in rows.train]
    trained = int(sum(row.trained.sum() for row in rows.train))
    numbers, histogram = length_summary(lengths)
    first = rows.train[0]
    return DataReport(
        source=rows.source,
        kind=settings.kind,
        rows=len(rows.train),
        evaluation_rows=len(rows.evaluation),
        context_length=settings.context_length,
        smallest_compressed=smallest_compressed,
        lengths=numbers,
        histogram=histogram,
        compressed_share=float(np.mean(np.asarray(lengths) > smallest_compressed)),
        trained_share=trained / sum(lengths),
        dropped=_counted(rows.dropped),
        evaluation_dropped=_counted(rows.evaluation_dropped),
        sample=marked_sample(tokenizer, first.input_ids.tolist(), first.trained.tolist()),
        fingerprints={"train": fingerprint(rows.train), "evaluation": fingerprint(rows.evaluation)},
        notes=rows.notes,
        warning=compression_warning(lengths, smallest_compressed),
    )


def _counted(dropped: Counter) -> dict[str, int]:
    return {reason: count for reason, count in dropped.most_common() if count}
