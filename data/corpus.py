"""From the `data` section of a run to tokenized training rows, evaluation rows, and the report on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import datasets
import numpy as np

from data.mixture import Source, mixed_rows, read_sources, streamed_rows
from data.report import DataReport, compression_warning, length_summary, marked_sample
from data.rows import fingerprint, to_dataset
from data.settings import DataSettings
from data.sources.files import DataError
from lrsa import PromptFormat


@dataclass(frozen=True)
class Corpus:
    """Rows of a run.

    Attributes:
        train: columns `input_ids` and `labels` (-100: token not trained); at most `context_length` tokens a row;
            when streaming, rows are made as they are asked for.
        evaluation: for qa and synthetic `{"prompt", "answers", "input_ids", "prompt_length"}`, where
            `input_ids[:prompt_length]` is the prompt as training rows have it (BOS or chat template included) and
            the rest the first answer with its end; for text `{"input_ids"}`; for chat also `trained`, of every token,
            and no `answers` where the last one is long. `source` names the source of a row.
        report: what the rows look like.
        prompt: what stands around prompts and answers of these rows.
        highest_token: of all rows; when streaming, of those that were looked at.
    """

    train: datasets.Dataset | datasets.IterableDataset
    evaluation: list[dict]
    report: DataReport
    prompt: PromptFormat
    highest_token: int


def load(settings: DataSettings, tokenizer, seed: int, smallest_compressed: int) -> Corpus:
    """Read or generate the data of a run and make its rows; the same arguments give the same rows on every process.

    Args:
        tokenizer: of the model that is trained.
        seed: decides what is held out, which distractors a row gets and where they go.
        smallest_compressed: `sink_size + 2 * lag_size`; rows up to this length are never compressed (for the report).

    Raises:
        DataError: data that is missing, empty, or not in the layout that the settings say; it says what to change.
    """
    sources = read_sources(settings, tokenizer, seed)
    for source in sources:
        _check(source)
    mixed = mixed_rows(sources, settings, seed)
    rows = [row for _, row in mixed]
    evaluation = [row | {"source": source.name} for source in sources for row in source.rows.evaluation]
    prompt = next((source.prompt for source in sources if source.settings.kind != "text"), sources[0].prompt)
    train = streamed_rows(sources, settings, seed) if settings.streaming else to_dataset(rows)
    highest = max(max(int(row.input_ids.max()) for row in rows), *(max(row["input_ids"]) for row in evaluation), 0)
    report = _report(sources, mixed, evaluation, settings, tokenizer, smallest_compressed)
    return Corpus(train, evaluation, report, prompt, highest)


def _check(source: Source) -> None:
    rows, settings = source.rows, source.settings
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


def _report(
    sources: list[Source], mixed: list, evaluation: list[dict], settings: DataSettings, tokenizer, smallest: int
) -> DataReport:
    rows = [row for _, row in mixed]
    lengths = [len(row.input_ids) for row in rows]
    numbers, histogram = length_summary(lengths)
    several, dropped, evaluation_dropped = len(sources) > 1, Counter(), Counter()
    for source in sources:
        dropped.update(source.rows.dropped)
        evaluation_dropped.update(source.rows.evaluation_dropped)
    notes = [f"{source.name}: {note}" if several else note for source in sources for note in source.rows.notes]
    return DataReport(
        source=", ".join(source.rows.source for source in sources),
        kind=" + ".join(dict.fromkeys(source.settings.kind for source in sources)),
        rows=len(rows),
        evaluation_rows=len(evaluation),
        context_length=settings.context_length,
        smallest_compressed=smallest,
        lengths=numbers,
        histogram=histogram,
        compressed_share=float(np.mean(np.asarray(lengths) > smallest)),
        trained_share=sum(int(row.trained.sum()) for row in rows) / sum(lengths),
        dropped=_counted(dropped),
        evaluation_dropped=_counted(evaluation_dropped),
        sample=marked_sample(tokenizer, rows[0].input_ids.tolist(), rows[0].trained.tolist()),
        fingerprints={"train": fingerprint(rows), "evaluation": fingerprint(evaluation)},
        notes=notes,
        warning=compression_warning(lengths, smallest),
        sources=[_line(number, source, mixed) for number, source in enumerate(sources)] if several else [],
        streaming=settings.streaming,
    )


def _line(number: int, source: Source, mixed: list) -> str:
    """What the report says about one source of several."""
    own = [row for owner, row in mixed if owner == number]
    tokens, every = (sum(len(row.input_ids) for row in rows) for rows in (own, [row for _, row in mixed]))
    rows = source.rows
    dropped = "; ".join(f"{count}: {reason}" for reason, count in _counted(rows.dropped).items())
    return (
        f"{source.name}: {source.settings.kind}, {len(own)} of {len(rows.train)} rows to train on, "
        f"{tokens / every:.1%} of the tokens, {len(rows.evaluation)} to evaluate on; dropped: {dropped or 'nothing'}"
    )


def _counted(dropped: Counter) -> dict[str, int]:
    return {reason: count for reason, count in dropped.most_common() if count}
