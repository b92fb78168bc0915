"""Records from a local file, a local directory or the Hugging Face Hub, and their columns by our names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from data.settings import DataSettings
from data.sources.files import DataError, ending, kind_of, records_of, shown
from data.sources.folders import read_folder

_BATCH = 1000


def read_records(
    path: str | list[str],
    name: str | None = None,
    split: str = "train",
    setting: str = "data.path",
    notes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The records of a data source, in its order.

    Args:
        path: a file (see `records_of`), a pattern of files such as `shards/*.jsonl`, a directory of such files of one
            kind, one that `datasets` saved, whatever `datasets.load_dataset` takes, such as a Hub name, or a list.
        name, split: configuration and split of a data set; entries that have neither are read whole.
        setting: what error messages say the path was given as.
        notes: gets a sentence on what of a directory was read.

    Raises:
        DataError: nothing there, not readable, or empty.
    """
    records = list(iterate_records(path, name, split, setting, notes))
    if not records:
        raise DataError(f"{setting} {path}: there is no record in it (split {split}).")
    return records


def iterate_records(
    path: str | list[str], name=None, split="train", setting="data.path", notes=None, stream: bool = False
) -> Iterator[dict[str, Any]]:
    """The records of `read_records` one after the other, read as they are needed.

    Args:
        stream: also read a data set of the Hub as it is needed, without its copy on this machine.
    """
    notes = [] if notes is None else notes
    paths = [path] if isinstance(path, str) else path
    for what, value, default, having in (("data.name", name, None, has_subsets), ("split", split, "train", has_splits)):
        if value != default and not any(map(having, paths)):
            raise DataError(f"{what} {value}: {setting} {path} has none: leave it out.")
    parts = (_source(part, name, split, setting, notes, stream) for part in paths)
    for number, record in enumerate(record for part in parts for record in part):
        if not isinstance(record, dict):
            raise DataError(f"{setting} {path}: records must be JSON objects, record {number} is {shown(record)}.")
        yield record


def _source(path: str, name, split: str, setting: str, notes: list[str], stream: bool) -> Iterator[Any]:
    file = Path(path).expanduser()
    name, split = name if has_subsets(path) else None, split if has_splits(path) else "train"
    if names_files(path):
        return records_of(file) if file.is_file() else _pattern(str(file), setting)
    if file.is_dir():
        return _directory(file, name, split, setting, notes)
    if ending(file) or path.startswith((".", "/", "~")):
        raise DataError(
            f"{setting} {path}: no such file; looked for {file.absolute()}. Check the path, or give a Hub name."
        )
    return _load_dataset(path, name, split, setting, stream)


def names_files(path: str) -> bool:
    """Whether a path is that of a file or a pattern of files."""
    return Path(path).expanduser().is_file() or (has_magic(path) and not Path(path).expanduser().is_dir())


def has_splits(path: str) -> bool:
    """Whether a path may be that of a data set with splits: no files, nor a single `Dataset` that was saved."""
    return not names_files(path) and not (Path(path).expanduser() / "state.json").is_file()


def has_subsets(path: str) -> bool:
    """Whether a path may be that of a data set with subsets: one of the Hub, or a folder whose card has them."""
    folder = Path(path).expanduser()
    return _has_configurations(folder) if folder.is_dir() else not names_files(path)


def _pattern(pattern: str, setting: str) -> Iterator[Any]:
    files = sorted(path for path in map(Path, glob(pattern, recursive=True)) if path.is_file())
    if not files:
        raise DataError(
            f"{setting} {pattern}: no file has a name like that. Check the pattern, or give a list of files."
        )
    if len({kind_of(file) for file in files}) > 1:
        listed = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise DataError(
            f"{setting} {pattern} names files of several kinds ({listed}): write the ending of the data into it, as in "
            f"{Path(pattern).parent / '*.jsonl'}."
        )
    return (record for file in files for record in records_of(file))


def _directory(folder: Path, name: str | None, split: str, setting: str, notes: list[str]) -> Iterator[Any]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_dataset(folder, split, setting)
    if _has_configurations(folder):
        return _load_dataset(str(folder), name, split, setting)
    found = read_folder(folder, split, setting)
    if found is None:
        return _load_dataset(str(folder), name, split, setting)
    notes.append(found.note(folder))
    return (record for file in found.files for record in records_of(file))


def _has_configurations(folder: Path) -> bool:
    """Whether the data set's card says which files belong to which configuration and split."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("---") if card.is_file() else []
    return len(head) > 2 and not head[0].strip() and "\nconfigs:" in head[1]


def _saved_dataset(folder: Path, split: str, setting: str) -> Iterator[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{setting} {folder} has no split {split!r}; its splits are {', '.join(saved)}.")
        saved = saved[split]
    return _rows(saved)


def _rows(table) -> Iterator[dict[str, Any]]:
    """The records of a data set, a thousand at a time."""
    return (record for batch in table.with_format("arrow").iter(_BATCH) for record in batch.to_pylist())


def read_evaluation_records(settings: DataSettings, notes: list[str] | None = None) -> list[dict[str, Any]] | None:
    """The records of `eval_path` and `eval_split`; None when evaluation rows are held out of the training data."""
    if settings.eval_rows == 0 or not (settings.eval_path or settings.eval_split):
        return None
    path = settings.eval_path or settings.path
    splits = any(map(has_splits, [path] if isinstance(path, str) else path))
    if not settings.eval_path and not (splits and isinstance(path, str)):
        raise DataError(
            f"data.eval_split {settings.eval_split}: data.path {path} is a file, or names files, and has no splits; "
            "give data.eval_path, or remove eval_split to hold rows out of what is there."
        )
    name = None if settings.eval_path else settings.name
    setting = "data.eval_path" if settings.eval_path else "data.path"
    split = settings.eval_split or (settings.split if splits else "train")
    return read_records(path, name, split, setting, notes)


def _load_dataset(
    path: str, name: str | None, split: str, setting: str, stream: bool = False
) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.packaged_modules.csv.csv import Csv

    try:
        builder = datasets.load_dataset_builder(path, name)
        # In a CSV file only an empty field is no value: "None" or "NA" may be an answer.
        options = {"keep_default_na": False, "na_values": [""]} if isinstance(builder, Csv) else {}
        return _rows(datasets.load_dataset(path, name, split=split, streaming=stream, **options))
    except Exception as error:  # network, Hub, builder and file errors share no base class; all mean the same here
        reason = re.sub(r" \(\w+\)$", "", str(error))  # the name of a Python exception
        raise DataError(
            f"{setting} {path} (name {name}, split {split}) cannot be loaded. There is no file or directory "
            f"{Path(path).absolute()}, or no data set in it, and datasets.load_dataset says: {reason}"
        ) from error
