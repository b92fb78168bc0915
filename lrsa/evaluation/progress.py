"""How far an evaluation is: rows done, time left and the score so far, on standard error."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from lrsa.evaluation.extra import extra

EVERY = 30.0  # seconds between two lines of a log file


class _Lines:
    """Standard error as a log file: whole lines in place of one that is written over."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """`write` has done it."""


class Progress:
    """A progress bar over all models and settings; a line every `EVERY` seconds where standard error is no terminal.

    Args:
        total: rows of the whole evaluation.
        silent: print nothing.
    """

    def __init__(self, total: int, silent: bool = False):
        every, file = (0.2, None) if sys.stderr.isatty() else (EVERY, _Lines())
        self.bar = extra("tqdm.auto").tqdm(
            total=total, disable=silent, unit="row", mininterval=every, maxinterval=every, file=file
        )

    def begin(self, name: str, unit: str) -> None:
        """What is measured from now on, and what its scores are called."""
        self.unit, self.scores = unit, []
        self.bar.set_description(name, refresh=False)

    def add(self, scores: Sequence[float]) -> None:
        """Count a batch by its rows' scores."""
        self.scores += scores
        self.bar.set_postfix_str(f"{self.unit} {statistics.fmean(self.scores):.3f} so far", refresh=False)
        self.bar.update(len(scores))
        if self.bar.n == self.bar.total:
            self.bar.close()
