"""Progress bars on a terminal, once per machine group: the other processes build the same rows in silence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """`items` with a progress bar; none in log files and on processes of a rank above 0."""
    silent = True if os.environ.get("RANK", "0") != "0" else None  # None: only where the output is no terminal
    return iter(tqdm(items, desc=description, total=total, disable=silent, leave=False))
