"""Records of one local file, as they stand in it: nothing is guessed, and what cannot be read is told by its place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

# File name ending -> kind; all data files of a directory must be of one kind.
KINDS = {
    ".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".zst")  # behind the ending of a text format, as in .jsonl.gz
_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH = 1000


class DataError(ValueError):
    """Data that cannot be used; the message says what was looked at and what to change."""


def ending(file: Path) -> str:
    """The ending that says what a file holds: .jsonl of `a.jsonl` and of `a.jsonl.zst`; "" when none is known."""
    packed = file.suffix in COMPRESSED
    found = Path(file.stem).suffix if packed else file.suffix
    return "" if KINDS.get(found) is None or (packed and KINDS[found] in ("parquet", "arrow")) else found


def kind_of(file: Path) -> str | None:
    """Which of `KINDS` a file is of, None when it is none."""
    return KINDS.get(ending(file))


def records_of(file: Path) -> Iterator[Any]:
    """The records of a file, read as they are needed; only .json, a single list, is read at once.

    A text file is one record `{"text": ...}`. Every value of a .csv or .tsv file is the text that stands there: `NA`,
    `None` and `007` are not turned into something else. Text formats may be compressed: .jsonl.gz, .json.zst, .csv.bz2.

    Raises:
        DataError: with file and line, or file and record.
    """
    kind = kind_of(file)
    if kind is None:
        packed = ", ".join(COMPRESSED)
        raise DataError(
            f"{file}: unknown kind of file; allowed are {', '.join(KINDS)}, text formats also with {packed} behind "
            "it. Convert it first."
        )
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(f"{file} is a Git LFS pointer, not the data: run git lfs pull, or download the file itself.")
    read = {"text": _text, "json": _json, "csv": _csv, "parquet": _parquet, "arrow": _arrow}[kind]
    try:
        yield from read(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): convert it first.") from error
    except (pyarrow.ArrowException, OSError) as error:
        name = {"parquet": "Parquet", "arrow": "Arrow"}.get(kind, "".join(file.suffixes[-2:]))
        raise DataError(f"{file} cannot be read as {name}: {error}") from error


def _lines(file: Path) -> io.TextIOWrapper:
    """The text of a file, unpacked, without a byte order mark, CRLF as LF."""
    return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="detect"), encoding="utf-8-sig")


def _text(file: Path) -> Iterator[dict[str, str]]:
    text = _lines(file).read()
    _refuse_nul(file, text)
    yield {"text": text}


def _json(file: Path) -> Iterator[Any]:
    if ending(file) == ".jsonl":
        yield from _json_lines(file, _lines(file))
        return
    text = _lines(file).read()
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record a line under the name .json, as the Hub often has it
            yield from _json_lines(file, io.StringIO(text))
            return
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f'{file} must hold a list of records, or {{"data": [...]}}, not {shown(content)}.')
    escaped = "\\ud" in text.lower()
    for number, record in enumerate(content):
        if escaped:
            _refuse_surrogates(file, number, record)
        yield record


def _json_lines(file: Path, lines: io.TextIOBase) -> Iterator[Any]:
    number = 0
    for place, line in enumerate(lines, 1):  # splitlines() would also cut at U+2028 inside a string
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}:{place}: not valid JSON: {error.msg}.") from error
            if "\\ud" in line.lower():
                _refuse_surrogates(file, number, record)
            yield record
            number += 1


def _csv(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # a field is a whole document; the default is 128 KiB
    reader = csv.reader(_lines(file), delimiter="\t" if ending(file) == ".tsv" else ",", strict=True)
    header: list[str] = []
    try:
        for row in reader:
            _refuse_nul(file, *row)
            if not header:
                header = row
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{file}:{reader.line_num}: {len(row)} fields, but the first line names {len(header)} columns: "
                        "put fields that hold a separator or a line break between double quotes."
                    )
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not valid CSV: {error}.") from error


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    for batch in parquet.ParquetFile(file).iter_batches(_BATCH):
        yield from batch.to_pylist()


def _arrow(file: Path) -> Iterator[dict[str, Any]]:
    """Both layouts of Arrow: the stream, which datasets writes, and the file with random access."""
    with pyarrow.memory_map(str(file)) as source:
        try:
            batches = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def _refuse_nul(file: Path, *texts: str) -> None:
    if any("\0" in text for text in texts):
        raise DataError(f"{file} holds NUL characters, as UTF-16 does when it is read as UTF-8: convert it to UTF-8.")


def _refuse_surrogates(file: Path, number: int, record: Any) -> None:
    for path, text in _texts(record):
        if found := _SURROGATE.search(text):
            around = text[max(found.start() - 20, 0) : found.end() + 20]
            raise DataError(
                f"{file}: record {number}, field {path}: {around!r} holds half of a character "
                f"(\\u{ord(found[0]):04x}), which no tokenizer can read: write the whole character, or remove it."
            )


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a record, with where it stands, such as `answers.0`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, f"{path}.{key}" if path else str(key))


def shown(value: Any) -> str:
    """A value for a message: its type, and its beginning."""
    return f"{type(value).__name__} {str(value)[:60]!r}"
