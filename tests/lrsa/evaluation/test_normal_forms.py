"""Answers that are different are different: numbers, options, names, scripts without blanks, several lines."""

import json
from itertools import pairwise

import pytest

from lrsa import LRSAConfig
from lrsa.evaluation import compare
from lrsa.evaluation.measure.normal_forms import (
    ARTICLES,
    MARKS,
    SQUAD,
    UNICODE,
    VERBATIM,
    rule_of,
    rules_of,
    words,
)
from lrsa.evaluation.measure.question_answering import exact_match, f1, score_question_answering
from lrsa.evaluation.report.tables import markdown


@pytest.mark.parametrize(
    "gold, rule, equal, different",
    [
        ("-5", MARKS, ["-5", "−5.", "(-5)"], ["5", "-6"]),
        ("5", SQUAD, ["5.", "$5"], ["6"]),
        ("3.14", MARKS, ["3.14", "3.14."], ["314", "3,14", "3.1"]),
        (".5", MARKS, [".5"], ["5", "0.5"]),
        ("10:30 a.m.", MARKS, ["10:30 AM", "the 10:30 a.m"], ["1030 am"]),
        ("1,234.5", MARKS, ["1234.5", "1,234.5"], ["12345"]),
        ("1,000,000", SQUAD, ["1000000"], ["1000", "1.000000", "-1000000"]),
        ("15", SQUAD, ["15", "the 15.", "15,"], ["1.5", "-15", "1/5"]),
        ("C++", MARKS, ["c++", "C++."], ["C", "C#"]),
        ("C#", MARKS, ["C#"], ["C++"]),
        ("A-", MARKS, ["A-"], ["A", "A+", "a b"]),
        ("the grade A-", MARKS, ["grade A-"], ["grade -", "grade A"]),
        ("A", ARTICLES, ["a", "A."], ["", "the", "B"]),
        ("The", ARTICLES, ["the"], ["", "a"]),
        ("->", VERBATIM, ["->"], ["", "<-"]),
        ("the well-known U.S. fox", SQUAD, ["wellknown US fox"], ["well known fox"]),
        ("北京是首都。", UNICODE, ["北京是首都", " 北京 是首都。"], ["北京"]),
        ("東京、３区", UNICODE, ["東京3区"], ["東京"]),
        ("नदी के पार।", UNICODE, ["नदी के पार"], ["नदी"]),
        ("ما هو؟", UNICODE, ["ما هو"], ["ما"]),
        ("Straße", SQUAD, ["straße!"], ["Strasse"]),
    ],
)
def test_answers_that_are_different_are_different(gold, rule, equal, different):
    assert rule_of(gold) == rule
    assert [exact_match(answer, gold) for answer in equal] == [1] * len(equal)
    assert [exact_match(answer, gold) for answer in different] == [0] * len(different)
    assert [f1(answer, gold) for answer in equal] == [1] * len(equal)
    assert all(f1(answer, gold) < 1 for answer in different)


def test_partial_answers_get_their_share():
    assert f1("A. The river", "A") == pytest.approx(2 * 1 / (3 + 1))
    assert f1("", "A") == 0
    assert f1("北京是城市", "北京是首都。") == pytest.approx(2 * 3 / 10)
    assert f1("ราชา", "ราชินี") > 0  # Thai


def test_correct_answers_of_several_lines_are_compared_whole():
    rows = [{"answers": ["first line\nsecond line"]}, {"answers": ["first line"]}]
    scores = score_question_answering(["First line.\nSecond line.", "first line\nQuestion: more"], rows)
    assert scores["exact_match"].per_row == scores["f1"].per_row == (1.0, 1.0)
    [cut] = score_question_answering(["first line"], rows[:1])["f1"].per_row
    assert cut == pytest.approx(2 * 2 / 6)


def test_rules_are_counted_for_the_report():
    assert rules_of(["Anna", "C++", "Ben"]) == f"{SQUAD} (2); {MARKS} (1)"


def official(text: str) -> list[str]:
    """Written after the evaluation script of SQuAD v1.1."""
    import re
    import string

    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_numbers_of_squad_stay_what_they_are(shared):
    """On real answers the words are SQuAD's, and two answers are equal when and only when SQuAD says so."""
    articles = json.loads((shared / "data/xquad.en.json").read_text())["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    golds = [answer["text"] for p in paragraphs for qa in p["qas"] for answer in qa["answers"]]
    assert len(golds) == 1190
    rules = [rule_of(gold) for gold in golds]
    assert rules.count(SQUAD) / len(golds) > 0.95 and set(rules) <= {SQUAD, MARKS}
    assert all(words(gold) == official(gold) for gold in golds)
    assert all(exact_match(a, b) == float(official(a) == official(b)) for a, b in pairwise(golds))


def test_the_report_says_which_rule_compared(random_llama, byte_tokenizer):
    ids = byte_tokenizer("the fox jumps over")["input_ids"]
    rows = [{"input_ids": [i % 48 for i in ids], "prompt_length": 3, "answers": [gold]} for gold in ("fox", "C++")]
    config = LRSAConfig(sink_size=2, lag_size=8, top_k=1)
    results = compare({"model": random_llama}, byte_tokenizer, rows, "qa", config, (), progress=False)
    assert f"{SQUAD} (1); {MARKS} (1)" in markdown(results)
