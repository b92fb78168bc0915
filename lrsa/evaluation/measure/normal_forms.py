"""Which words of two answers are compared: SQuAD's rule where it fits the correct answer, else one that tells it apart.

SQuAD drops case, punctuation and articles, so that `-5` would equal `5`, `C++` equal `C#`, the option `A` be nothing at
all, and a Chinese answer be a single word. The rule follows from the correct answer and is applied to both.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

SQUAD = "SQuAD's rule, unless an answer has a sign or point in a number"
MARKS = "SQuAD's rule, with the signs and points of numbers and marks as in C++ kept"
ARTICLES = "SQuAD's rule, with articles kept"
VERBATIM = "words as they are written"
UNICODE = "Unicode punctuation removed, characters of scripts without blanks compared one by one"

_ARTICLES = re.compile(r"\b(a|an|the)\b(?![-*+#])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A sign, a point within or before a number, the end of C++ and C#, and the grade A-.
_MARKS = re.compile(r"(?<!\w)-(?=\.?\d)|(?<=\d)[.,:/](?=\d)|(?<!\w)\.(?=\d)|(?<=\w)[+#]+(?!\w)|(?<=\b[a-z])[-*](?!\w)")
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer are written without blanks between words.
_UNSPACED = re.compile(
    "([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


def rule_of(gold: str) -> str:
    """The rule by which answers are compared with this correct answer."""
    text = gold.lower().replace("\u2212", "-")
    if any(letter.isalpha() and "LATIN" not in unicodedata.name(letter, "LATIN") for letter in text):
        return UNICODE
    if _MARKS.search(_THOUSANDS.sub("", text)):
        return MARKS
    return next((rule for rule in (SQUAD, ARTICLES) if words(gold, rule)), VERBATIM)


def rule_for(answer: str, gold: str) -> str:
    """`rule_of` the correct answer, unless the answer has signs that it would not see: 1.5 is not 15."""
    rule = rule_of(gold)
    return MARKS if rule == SQUAD and rule_of(answer) == MARKS else rule


def words(text: str, rule: str = SQUAD) -> list[str]:
    """The words of an answer in the normal form of `rule`."""
    text = text.lower()
    if rule == VERBATIM:
        return text.split()
    if rule == UNICODE:
        text = unicodedata.normalize("NFKC", text)
    if rule in (MARKS, UNICODE):
        text = _THOUSANDS.sub("", text.replace("\u2212", "-"))
        kept = {place for found in _MARKS.finditer(text) for place in range(*found.span())}
    else:
        kept = set()
    dropped = _is_punctuation if rule == UNICODE else string.punctuation.__contains__
    text = "".join(letter for place, letter in enumerate(text) if place in kept or not dropped(letter))
    if rule in (SQUAD, MARKS):
        text = _ARTICLES.sub(" ", text)
    return (_UNSPACED.sub(r" \1 ", text) if rule == UNICODE else text).split()


def rules_of(golds: Iterable[str]) -> str:
    """The rules of these correct answers, and how many of them each rule compares, for a report."""
    counts = Counter(map(rule_of, golds))
    return "; ".join(f"{rule} ({count})" for rule, count in counts.most_common())


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")
