"""Which files of a local directory are its data: all of one kind, without what only describes them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.sources.files import DataError, kind_of

# Files that stand beside data and say something about them.
_PROSE = re.compile(
    r"(read_?me|licen[cs]e|copying|copyright|notice|citation|change_?log|changes|contributing|authors|credits|todo|"
    r"code_of_conduct|security|data_?set_?card|requirements)([-_. ].*)?",
    re.IGNORECASE,
)
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


class Folder(NamedTuple):
    """Data files of a directory, and those that are left aside, each in the order of their names."""

    files: list[Path]
    ignored: list[Path]

    def note(self, folder: Path) -> str:
        """What was read and what was not, in one sentence."""
        text = f"read {len(self.files)} of the files in {folder}: {_named(self.files, folder)}"
        return text + (f"; ignored: {_named(self.ignored, folder)}" if self.ignored else "")


def read_folder(folder: Path, split: str, setting: str) -> Folder | None:
    """The files of a split of a directory and its sub-folders; None when they are of kinds that only `datasets` reads.

    Files that describe the data (README, LICENSE and the like, hidden ones) are left aside. Splits are told apart as
    `datasets` does by the names of data files, and of texts by sub-folders that are all called train, test and so on.

    Raises:
        DataError: no data, data of several kinds, or no such split.
    """
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    found = [path for path in paths if kind_of(path) and not _describes(path)]
    kinds = Counter(map(kind_of, found))
    if len(kinds) > 1:
        listed = "; ".join(
            f"{kind}: {_named([path for path in found if kind_of(path) == kind], folder)}" for kind in kinds
        )
        raise DataError(
            f"{setting} {folder} holds files of several kinds, and which of them are the data is not clear. {listed}. "
            f"Name one file or a sub-folder with {setting}, or move the others away."
        )
    if not found:
        prose = any(kind_of(path) == "text" and path.suffix != ".md" for path in paths)  # datasets would read it
        if not prose and any(kind_of(path) is None and not _describes(path) for path in paths):
            return None
        listed = f"nothing but {_named(paths, folder)}" if paths else "no file"
        raise DataError(f"{setting} {folder} holds {listed}: name the file itself with {setting} to use it as data.")
    splits = _text_splits(found, folder) if "text" in kinds else _data_splits(found, folder)
    if split not in splits:
        raise DataError(f"{setting} {folder} has no split {split!r}; its splits are {', '.join(splits)}.")
    of_a_split = {path for files in splits.values() for path in files}
    return Folder(splits[split], [path for path in paths if path not in of_a_split])


def _describes(path: Path) -> bool:
    return path.name in _METADATA or (path.suffix in (".txt", ".md", "") and bool(_PROSE.fullmatch(path.name)))


def _text_splits(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    places = [path.relative_to(folder).parts for path in files]
    if not all(len(parts) > 1 and parts[0].lower() in _SPLITS for parts in places):
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for parts, path in zip(places, files, strict=True):
        splits.setdefault(_SPLITS[parts[0].lower()], []).append(path)
    return splits


def _data_splits(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        resolved = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        return {"train": files}
    known = {str(path.resolve()): path for path in files}
    splits = {str(name): [known[path] for path in map(str, paths) if path in known] for name, paths in resolved.items()}
    return {name: paths for name, paths in splits.items() if paths} or {"train": files}


def _named(paths: list[Path], folder: Path, most: int = 5) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
