"""The sources of a run: each with its own rows, mixed as `data.sources` says, and built as needed when streaming.

What is evaluated in one source is trained on in none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

import datasets

from data.chat.rows import chat_rows
from data.question_answering import question_answering_rows
from data.rows import Records, Row, Rows, columns_of_row
from data.settings import DataSettings
from data.sources.files import DataError
from data.sources.records import iterate_records, read_evaluation_records, read_records
from data.synthetic.rows import synthetic_rows
from data.text import text_rows
from lrsa import PromptFormat

MAKE = {"qa": question_answering_rows, "chat": chat_rows, "text": text_rows, "synthetic": synthetic_rows}
BLOCK = 1000  # records that are read and made rows of at once when streaming


class Source:
    """One source of rows.

    Attributes:
        name: short, as in `DataSettings.each`.
        rows: made of all records; when streaming, of the first block.
    """

    def __init__(self, name: str, settings: DataSettings, tokenizer, seed: int):
        self.name, self.settings, self.tokenizer, self.seed = name, settings, tokenizer, seed
        self.turn = _prompt_format(settings, tokenizer)
        self.held: frozenset[str] = frozenset()
        self.rows = self._first_rows()

    def exclude(self, held: set[str]) -> None:
        """Train on nothing that other sources evaluate on, which is given by its normal forms."""
        self.held = frozenset(held - self.rows.held)
        if self.held & self.rows.seen:
            self.rows = self._first_rows()

    @property
    def prompt(self) -> PromptFormat:
        """What stands around prompts and answers of the rows."""
        return self.rows.prompt or self.turn

    def stream(self) -> Iterator[Row]:
        """The rows to train on, made block by block, always the same ones."""
        later = (self._made(number, records).train for number, records in enumerate(self._blocks([])) if number)
        return islice(chain(self.rows.train, chain.from_iterable(later)), self.settings.max_rows)

    def _first_rows(self) -> Rows:
        notes: list[str] = []
        records = next(self._blocks(notes))
        evaluation = read_evaluation_records(self.settings, notes)
        rows = self._made(0, dataclasses.replace(records, evaluation=evaluation))
        rows.notes[:0] = notes
        return rows

    def _blocks(self, notes: list[str]) -> Iterator[Records]:
        """The records to train on, all at once unless streaming."""
        settings = self.settings
        if settings.path is None:
            yield from (Records([]) for _ in range(0, settings.synthetic.rows, BLOCK))
            return
        source = (settings.path, settings.name, settings.split)
        if not settings.streaming:
            yield Records(read_records(*source, notes=notes))
            return
        records = iterate_records(*source, notes=notes, stream=True)
        for number in count():
            block = list(islice(records, BLOCK))
            if not block and number == 0:
                raise DataError(f"{settings.source}: there is no record in it (split {settings.split}).")
            if not block:
                return
            yield Records(block, first=number * BLOCK)

    def _made(self, number: int, records: Records) -> Rows:
        """Rows of a block; all evaluation rows come from the first one."""
        settings, changes = self.settings, {}
        if settings.streaming:
            changes = {"max_rows": None} | ({"eval_rows": 0} if number else {})
            rows = min(BLOCK, settings.synthetic.rows - number * BLOCK)
            changes["synthetic"] = settings.synthetic.model_copy(update={"rows": max(rows, 1)})
        held = self.held | self.rows.held if number else self.held
        records, seed = dataclasses.replace(records, held=held), self.seed + 1_000_003 * number
        rows = MAKE[settings.kind](settings.model_copy(update=changes), self.tokenizer, seed, self.turn, records)
        plain = None if rows.prompt is None else dataclasses.replace(PromptFormat.plain(self.tokenizer), lead="")
        if number and rows.train and (rows.prompt == plain) != (self.rows.prompt == plain):
            raise DataError(
                f"{settings.source}: among the records from {records.first} on prompts and completions are texts where "
                "before they were messages, or the other way round: put them into files of their own."
            )
        return rows


def read_sources(settings: DataSettings, tokenizer, seed: int) -> list[Source]:
    """The sources of a run, none of which is trained on what another one evaluates.

    Raises:
        DataError: data that cannot be used.
    """
    sources = [Source(name, one, tokenizer, seed) for name, one in settings.each().items()]
    held = {form for source in sources for form in source.rows.held}
    for source in sources:
        source.exclude(held)
    return sources


def mixed_rows(sources: Sequence[Source], settings: DataSettings, seed: int) -> list[tuple[int, Row]]:
    """Number of its source and row, of all rows to train on, in the proportions of the weights if there are any."""
    tables = [
        datasets.Dataset.from_dict({"source": [number] * len(source.rows.train), "row": range(len(source.rows.train))})
        for number, source in enumerate(sources)
    ]
    table = _interleaved(tables, settings, seed) if _weights(settings) else datasets.concatenate_datasets(tables)
    return [(entry["source"], sources[entry["source"]].rows.train[entry["row"]]) for entry in table.to_list()]


def streamed_rows(sources: Sequence[Source], settings: DataSettings, seed: int) -> datasets.IterableDataset:
    """The rows to train on, made as they are asked for."""
    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    streams = [datasets.IterableDataset.from_generator(_Examples(source), features=features) for source in sources]
    return _interleaved(streams, settings, seed) if len(streams) > 1 else streams[0]


class _Examples:
    """The rows of a source as `datasets` reads them, which would otherwise copy and pickle the source to name it."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self) -> Iterator[dict]:
        return map(columns_of_row, self.source.stream())

    def __deepcopy__(self, memo: dict) -> _Examples:
        return self

    def __reduce__(self):
        return str, (self.source.name,)


def _interleaved(tables: list, settings: DataSettings, seed: int):
    weights = _weights(settings)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(
        tables, probabilities=shares, seed=seed, stopping_strategy=settings.stopping_strategy
    )


def _weights(settings: DataSettings) -> list[float]:
    return [source.weight for source in settings.sources or [] if source.weight is not None]


def _prompt_format(settings: DataSettings, tokenizer) -> PromptFormat:
    """What stands around prompts and answers: that of the chat template, but for text, where no one is asked.

    Raises:
        DataError: when the chat template cannot be used.
    """
    try:
        return PromptFormat.plain(tokenizer) if settings.kind == "text" else PromptFormat.of(tokenizer)
    except ValueError as error:
        raise DataError(f"data.kind {settings.kind}: {error}") from error
