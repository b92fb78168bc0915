"""What is wrong with a configuration: every problem at once, each with the place where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to correct: `where` (file and line, or `--set`), the dotted `field`, and what is wrong with it."""

    where: str
    field: str
    text: str

    def __str__(self) -> str:
        place = " ".join(part for part in (self.where, self.field) if part)
        if not place:
            return self.text
        return f"{place} {self.text}" if self.text.startswith("must ") else f"{place}: {self.text}"


class SettingsError(ValueError):
    """A run that cannot start as it was described; its text is one line per problem."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def unknown_setting(name: str, names: Iterable[str]) -> str:
    """The text of a problem: a name that no setting has, with the closest one or else all that there are."""
    names = list(names)
    close = did_you_mean(name, names)
    allowed = f"; allowed are {', '.join(names)}" if names else ""
    return f"unknown setting{close or allowed}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
