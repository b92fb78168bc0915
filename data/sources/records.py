"""Records from a local file, a local directory or the Hugging Face Hub, and their columns by our names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.settings import DataSettings
from data.sources.files import KINDS, DataError, read_file, shown
from data.sources.folders import read_folder

_CHATS = ("messages", "conversations", "conversation", "prompt", "chosen")


def read_records(
    path: str,
    name: str | None = None,
    split: str = "train",
    setting: str = "data.path",
    notes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The records of a data source, in its order.

    Args:
        path: a file (see `read_file`), a directory of such files of one kind, one that `datasets` saved, or whatever
            `datasets.load_dataset` takes, such as a Hub name.
        name, split: configuration and split of a data set; files have neither.
        setting: what error messages say the path was given as.
        notes: gets a sentence on what of a directory was read.

    Raises:
        DataError: nothing there, not readable, or empty.
    """
    file = Path(path).expanduser()
    if file.is_file():
        records = read_file(file)
    elif file.is_dir():
        records = _read_directory(file, name, split, setting, [] if notes is None else notes)
    elif file.suffix in KINDS or path.startswith((".", "/", "~")):
        raise DataError(
            f"{setting} {path}: no such file; looked for {file.absolute()}. Check the path, or give a Hub name."
        )
    else:
        records = _load_dataset(path, name, split, setting)
    if not records:
        raise DataError(f"{setting} {path}: there is no record in it (split {split}).")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{setting} {path}: records must be JSON objects, record {number} is {shown(record)}.")
    return records


def _read_directory(folder: Path, name: str | None, split: str, setting: str, notes: list[str]) -> list[Any]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_dataset(folder, split, setting)
    if name is not None or _has_configurations(folder):
        return _load_dataset(str(folder), name, split, setting)
    found = read_folder(folder, split, setting)
    if found is None:
        return _load_dataset(str(folder), name, split, setting)
    notes.append(found.note(folder))
    return [record for file in found.files for record in read_file(file)]


def _has_configurations(folder: Path) -> bool:
    """Whether the data set's card says which files belong to which configuration and split."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace").split("---") if card.is_file() else []
    return len(head) > 2 and not head[0].strip() and "\nconfigs:" in head[1]


def _saved_dataset(folder: Path, split: str, setting: str) -> list[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{setting} {folder} has no split {split!r}; its splits are {', '.join(saved)}.")
        saved = saved[split]
    return saved.to_list()


def read_evaluation_records(settings: DataSettings, notes: list[str] | None = None) -> list[dict[str, Any]] | None:
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
    return read_records(path, name, settings.eval_split or settings.split, setting, notes)


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
    if chats := [name for name in _CHATS if isinstance(records[0].get(name), list)]:
        raise DataError(
            f"{source}: the records are chats (column {chats[0]!r}), which are not trained on. Write a file with one "
            'record for each answer, {"question": "...", "context": "...", "answers": "..."}, for kind: qa, or with '
            'the whole text of each, {"text": "..."}, for kind: text.'
        )
    raise DataError(
        f"{source}: there is no column {wanted!r}; the columns are {', '.join(map(str, records[0]))}. "
        f"Say which one to use with data.columns, for example columns: {{{ours}: {next(iter(records[0]), 'name')}}}."
    )


def _load_dataset(path: str, name: str | None, split: str, setting: str) -> list[dict[str, Any]]:
    import datasets
    from datasets.packaged_modules.csv.csv import Csv

    try:
        builder = datasets.load_dataset_builder(path, name)
        # In a CSV file only an empty field is no value: "None" or "NA" may be an answer.
        options = {"keep_default_na": False, "na_values": [""]} if isinstance(builder, Csv) else {}
        return datasets.load_dataset(path, name, split=split, **options).to_list()
    except Exception as error:  # network, Hub, builder and file errors share no base class; all mean the same here
        raise DataError(
            f"{setting} {path} (name {name}, split {split}) cannot be loaded. There is no file or directory "
            f"{Path(path).absolute()}, or no data set in it, and datasets.load_dataset says: {error}"
        ) from error
