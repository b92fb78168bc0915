import pytest
from pydantic import ValidationError

from data import DataSettings


def problems(**values) -> list[tuple]:
    with pytest.raises(ValidationError) as caught:
        DataSettings(**values)
    return [(".".join(map(str, error["loc"])), error["msg"]) for error in caught.value.errors()]


def test_defaults_are_enough_for_each_kind():
    assert DataSettings(kind="qa", path="a.json").prompt_template.count("{context}") == 1
    assert DataSettings(kind="text", path="a.txt").join_documents is False
    assert DataSettings(kind="synthetic").synthetic.keys == 4
    assert DataSettings(kind="synthetic", synthetic={"digits": 2}).synthetic.digits == 2


def test_every_setting_is_described():
    for model in (DataSettings, type(DataSettings(kind="synthetic").synthetic)):
        assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize("kind", ["qa", "chat", "text"])
def test_a_kind_that_reads_needs_a_path(kind):
    [(place, text)] = problems(kind=kind)
    assert place == "path" and f"kind {kind} needs path" in text


def test_a_kind_that_generates_refuses_a_path():
    [(place, text)] = problems(kind="synthetic", path="a.json")
    assert place == "path" and "a.json" in text


def test_wrong_values_are_all_named_at_once():
    found = dict(problems(kind="qa", path="a.json", context_length="long", eval_rows=-1, max_rows=2.5, colums={}))
    assert set(found) == {"context_length", "eval_rows", "max_rows", "colums"}


def test_columns_map_our_names_only():
    [(place, text)] = problems(kind="qa", path="a.json", columns={"quesion": "q"})
    assert place == "columns" and "quesion" in text and "one of question, context, answers, the right" in text
    [(place, text)] = problems(kind="qa", path="a.json", columns={"messages": "q"})
    assert place == "columns" and "unknown column messages" in text


@pytest.mark.parametrize(
    "template, part",
    [
        ("{context}\n\nAnswer:", "{question}"),
        ("{context}\n{context}\n{question}", "{context} exactly once, found 2"),
        ("{context}\n\n{question}\n", "must not begin or end"),
        ("{context}: {question}", "blank line after {context}"),
        ("{question}\n\n{context}", "blank line after {context}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, part):
    [(place, text)] = problems(kind="qa", path="a.json", prompt_template=template)
    assert place == "prompt_template" and part in text
