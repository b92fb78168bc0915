"""How far an evaluation is: one line that is rewritten on a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

EVERY = 30.0  # seconds between two lines of a log file


class Progress:
    """Rows done, time left and the score so far, on standard error.

    Args:
        total: rows of the whole evaluation.
        silent: print nothing.
    """

    def __init__(self, total: int, silent: bool = False):
        self.total, self.silent, self.done = total, silent, 0
        self.start = self.printed = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.begin("")

    def begin(self, name: str, unit: str = "") -> None:
        """What is measured from now on, and what its scores are called."""
        self.name, self.unit, self.scores = name, unit, []

    def add(self, scores: Sequence[float]) -> None:
        """Count a batch by its rows' scores."""
        self.done += len(scores)
        self.scores += scores
        now, last = time.monotonic(), self.done >= self.total
        if self.silent or not (last or now - self.printed >= (0.2 if self.terminal else EVERY)):
            return
        self.printed = now
        left = (now - self.start) * (self.total - self.done) / self.done
        mean = math.fsum(self.scores) / len(self.scores)
        line = f"{self.done} of {self.total} rows, {_minutes(left)} left; {self.name}: {self.unit} {mean:.3f} so far"
        end = "" if self.terminal and not last else "\n"
        print(("\r\033[K" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
