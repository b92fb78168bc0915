"""Columns by our names; where a file has others, the message says what to set, and that really works."""

import re

import pytest

from data import DataError
from data.sources.columns import columns_of

QA = ("question", "context", "answers")


def columns(record, columns=None, ours=QA, kind="qa"):
    return columns_of([record], ours, columns or {}, "f.jsonl", kind)


def test_columns_are_found_by_our_name_or_the_mapped_one():
    assert columns({"answers": 1}, ours=("answers",)) == ["answers"]
    assert columns({"answer": 1}, ours=("answers",)) == ["answer"]
    assert columns({"reply": 1, "answer": 1}, {"answers": "reply"}, ours=("answers",)) == ["reply"]


@pytest.mark.parametrize(
    "record, kind, advice",
    [
        ("query document response id", "qa", "{question: query, context: document, answers: response}"),
        ("id question article answer", "qa", "{context: article, answers: answer}"),
        ("instruction input output", "qa", "{question: instruction, context: input, answers: output}"),
        ("id content", "text", "{text: content}"),
    ],
)
def test_the_columns_that_a_message_tells_are_found(record, kind, advice):
    record, ours = dict.fromkeys(record.split(), "x"), QA if kind == "qa" else ("text",)
    with pytest.raises(DataError) as caught:
        columns(record, ours=ours, kind=kind)
    text = str(caught.value)
    assert text.startswith("f.jsonl: there is no column ") and ", ".join(record) in text and advice in text
    line = re.search(r"data\.columns: \{(.*)\}", text)[1]
    assert all(name in record for name in columns(record, dict(pair.split(": ") for pair in line.split(", ")), ours))


@pytest.mark.parametrize("record", [{"messages": [{}]}, {"conversations": [{}]}, {"prompt": "a", "completion": "b"}])
@pytest.mark.parametrize("ours, kind", [(QA, "qa"), (("text",), "text")])
def test_chats_under_another_kind(record, ours, kind):
    with pytest.raises(DataError, match=r"set data\.kind: chat\.$"):
        columns(record, ours=ours, kind=kind)


def test_unknown_columns_are_named():
    with pytest.raises(
        DataError, match=r"no column 'content'; the columns are bodi, id\. .*data\.columns: \{text: NAME\}"
    ):
        columns({"bodi": 1, "id": 2}, {"text": "content"}, ours=("text",), kind="text")
