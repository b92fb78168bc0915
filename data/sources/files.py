"""Records of one local file, as they stand in it: nothing is guessed, and what cannot be read is told by its place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# File name ending -> kind; all data files of a directory must be of one kind.
KINDS = {
    ".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be used; the message says what was looked at and what to change."""


def read_file(file: Path) -> list[Any]:
    """The records of a .json, .jsonl, .csv, .tsv, .parquet, .txt or .md file.

    A text file is one record `{"text": ...}`. Every value of a .csv or .tsv file is the text that stands there: `NA`,
    `None` and `007` are not turned into something else.

    Raises:
        DataError: with file and line, or file and record.
    """
    kind = KINDS.get(file.suffix)
    if kind is None:
        raise DataError(f"{file}: unknown kind of file; allowed are {', '.join(KINDS)}. Convert it first.")
    if kind == "parquet":
        return _parquet(file)
    try:
        text = file.read_text(encoding="utf-8-sig")  # -sig drops a byte order mark; read_text turns CRLF into LF
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): convert it first.") from error
    if kind == "text":
        return [{"text": text}]
    if kind == "csv":
        return _csv(file, text)
    records = _json_lines(file, text) if file.suffix == ".jsonl" else _json(file, text)
    if "\\ud" in text.lower():
        _refuse_surrogates(file, records)
    return records


def _json(file: Path, text: str) -> list[Any]:
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record a line under the name .json, as the Hub often has it
            return _json_lines(file, text)
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f'{file} must hold a list of records, or {{"data": [...]}}, not {shown(content)}.')
    return content


def _json_lines(file: Path, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a string
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}:{number}: not valid JSON: {error.msg}.") from error
    return records


def _csv(file: Path, text: str) -> list[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # a field is a whole document; the default is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    records, header = [], []
    try:
        for row in reader:
            if not header:
                header = row
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{file}:{reader.line_num}: {len(row)} fields, but the first line names {len(header)} columns: "
                        "put fields that hold a separator or a line break between double quotes."
                    )
                records.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not valid CSV: {error}.") from error
    return records


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _refuse_surrogates(file: Path, records: list[Any]) -> None:
    for number, record in enumerate(records):
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
