"""Texts that differ only in blanks, line ends, case or Unicode form count as one: none is both trained and held out."""

from __future__ import annotations

import unicodedata


class DistinctTexts:
    """Numbers texts from 0 on; one that is there already, in this or another writing, has the number it has.

    Attributes:
        texts: the texts in the order of their numbers, each as it was written first.
        rewritten: how many writings beyond the first were met, each counted once.
    """

    def __init__(self):
        self.texts: list[str] = []
        self.rewritten = 0
        self._number_of: dict[str, int] = {}
        self._number_of_form: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of `text`; a new one when no writing of it is there."""
        if text in self._number_of:
            return self._number_of[text]
        number = self._number_of_form.setdefault(normal_form(text), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        else:
            self.rewritten += 1
        self._number_of[text] = number
        return number


def normal_form(text: str) -> str:
    """Unicode form NFKC, without case, every run of blanks and line ends one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
