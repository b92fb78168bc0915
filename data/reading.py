"""Records from a local file, a local data set directory or the Hugging Face Hub, and their columns by our names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.settings import DataSettings

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".json", ".jsonl")


class DataError(ValueError):
    """Data that cannot be used; the message says what was looked at and what to change."""


def read_records(
    path: str, name: str | None = None, split: str = "train", setting: str = "data.path"
) -> list[dict[str, Any]]:
    """The records of a data source, in its order.

    Args:
        path: a .json file (a list of records, or `{"data": [...]}`), a .jsonl file, a .txt or .md file (one record
            `{"text": ...}`), a directory of such text files, or whatever `datasets.load_dataset` takes: another local
            directory or a Hub name.
        name, split: configuration and split of a data set; files have neither.
        setting: what error messages say the path was given as.

    Raises:
        DataError: nothing there, not readable, or empty.
    """
    file = Path(path).expanduser()
    texts = sorted(found for found in file.iterdir() if found.suffix in TEXT_SUFFIXES) if file.is_dir() else []
    if file.is_file():
        records = _read_file(file)
    elif texts:  # load_dataset would make one record of every line
        records = [record for text in texts for record in _read_file(text)]
    elif file.suffix in TEXT_SUFFIXES + JSON_SUFFIXES or (path.startswith((".", "/", "~")) and not file.is_dir()):
        raise DataError(
            f"{setting} {path}: no such file; looked for {file.absolute()}. Check the path, or give a Hub name."
        )
    else:
        records = _load_dataset(str(file) if file.is_dir() else path, name, split, setting)
    if not records:
        raise DataError(f"{setting} {path}: there is no record in it (split {split}).")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{setting} {path}: records must be JSON objects, record {number} is {_shown(record)}.")
    return records


def read_evaluation_records(settings: DataSettings) -> list[dict[str, Any]] | None:
    """The records of `eval_path` and `eval_split`; None when evaluation rows are held out of the training data."""
    if settings.eval_rows == 0 or not (settings.eval_path or settings.eval_split):
        return None
    path = settings.eval_path or settings.path
    if not settings.eval_path and Path(path).expanduser().is_file():
        raise DataError(
            f"data.eval_split {settings.eval_split}: data.path {path} is a file and has no splits; "
            "give data.eval_path, or remove eval_split to hold rows out of the file."
        )
    name = None if settings.eval_path else settings.name
    setting = "data.eval_path" if settings.eval_path else "data.path"
    return read_records(path, name, settings.eval_split or settings.split, setting)


def evaluation_source(settings: DataSettings) -> str:
    """What error messages call the records of `read_evaluation_records`."""
    return f"data.eval_path {settings.eval_path}" if settings.eval_path else f"data.path {settings.path}"


def column(records: Sequence[dict], ours: str, columns: dict[str, str], source: str) -> str:
    """The file's name of our column; `source` is what error messages call the records.

    Raises:
        DataError: naming the columns that exist and `data.columns`, when the first record has no such column.
    """
    wanted = columns.get(ours, ours)
    if wanted in records[0]:
        return wanted
    if wanted == "answers" and "answer" in records[0]:  # HotpotQA and many others
        return "answer"
    raise DataError(
        f"{source}: there is no column {wanted!r}; the columns are {', '.join(map(str, records[0]))}. "
        f"Say which one to use with data.columns, for example columns: {{{ours}: {next(iter(records[0]), 'name')}}}."
    )


def _read_file(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # -sig drops a byte order mark; read_text turns CRLF into LF
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): convert it first.") from error
    if file.suffix in TEXT_SUFFIXES:
        return [{"text": text}]
    if file.suffix not in JSON_SUFFIXES:
        raise DataError(
            f"{file}: unknown kind of file; allowed are {', '.join(JSON_SUFFIXES + TEXT_SUFFIXES)}; "
            "for others, such as .parquet or .csv, give the directory they lie in."
        )
    if file.suffix == ".jsonl":
        return _json_lines(file, text)
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record a line under the name .json, as the Hub often has it
            return _json_lines(file, text)
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f'{file} must hold a list of records, or {{"data": [...]}}, not {_shown(content)}.')
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


def _load_dataset(path: str, name: str | None, split: str, setting: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split).to_list()
    except Exception as error:  # network, Hub, builder and file errors share no base class; all mean the same here
        raise DataError(
            f"{setting} {path} (name {name}, split {split}) cannot be loaded. There is no file or directory "
            f"{Path(path).absolute()}, or no data set in it, and datasets.load_dataset says: "
            f"{type(error).__name__}: {error}"
        ) from error


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
