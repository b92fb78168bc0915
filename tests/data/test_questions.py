from collections import Counter

import pytest

from data import DataError
from data.duplicates import DistinctTexts
from data.questions import NO_ANSWER, NO_CONTEXT, NO_QUESTION, layout_of, read_questions


def read(records, layout="auto", columns=None):
    """Questions as plain values, with passages by text, and what was dropped."""
    passages, dropped = DistinctTexts(), Counter()
    layout = layout_of(records[0], layout, columns or {})
    questions = read_questions(records, layout, columns or {}, "f.json", passages, dropped)
    texts = passages.texts
    shown = [(q.text, list(q.answers), [texts[n] for n in q.gold], [texts[n] for n in q.own]) for q in questions]
    return shown, dict(dropped)


def squad(*qas, context="Anna found it."):
    return {"title": "T", "paragraphs": [{"context": context, "qas": list(qas)}]}


def qa(question, *answers, **more):
    return {"question": question, "answers": [{"text": text, "answer_start": 0} for text in answers], **more}


def test_squad_gives_all_accepted_answers_once():
    shown, dropped = read([squad(qa(" Who? ", "Anna", "Anna ", "she"))])
    assert shown == [("Who?", ["Anna", "she"], ["Anna found it."], [])] and not dropped


def test_unanswerable_questions_are_dropped_and_counted():
    shown, dropped = read(
        [squad(qa("Who?", "Anna"), qa("When?"), qa("Where?", "here", is_impossible=True), qa(" ", "Anna"))]
    )
    assert [question for question, *_ in shown] == ["Who?"]
    assert dropped == {NO_ANSWER: 2, NO_QUESTION: 1}


def test_equal_passages_are_one():
    shown, _ = read([squad(qa("Who?", "Anna")), squad(qa("What?", "it")), squad(qa("X?", "x"), context="Other.")])
    passages, dropped = DistinctTexts(), Counter()
    found = read_questions([squad(qa("A?", "a")), squad(qa("B?", "b"))], "squad", {}, "f", passages, dropped)
    assert found[0].gold == found[1].gold and len(passages.texts) == 1
    assert len(shown) == 3


HOTPOT = {
    "question": "Who?",
    "answer": "Anna",
    "supporting_facts": {"title": ["B", "A", "B"], "sent_id": [0, 0, 1]},
    "context": {"title": ["A", "X", "B"], "sentences": [["One.", " Two."], ["No."], ["Three."]]},
}


def test_hotpotqa_passages_of_supporting_facts_are_gold():
    expected = [("Who?", ["Anna"], ["A\nOne. Two.", "B\nThree."], ["X\nNo."])]
    assert read([HOTPOT])[0] == expected
    original = HOTPOT | {
        "context": [["A", ["One.", " Two."]], ["X", ["No."]], ["B", ["Three."]]],
        "supporting_facts": [["B", 0], ["A", 0], ["B", 1]],
    }
    assert read([original])[0] == expected


def test_hotpotqa_without_supporting_facts_needs_all_passages():
    [(_, _, gold, own)], _ = read([HOTPOT | {"supporting_facts": None}])
    assert len(gold) == 3 and not own


@pytest.mark.parametrize("answers", ["Anna", ["Anna"], {"text": ["Anna"], "answer_start": [0]}])
def test_generic_answers_and_mapped_columns(answers):
    records = [{"q": "Who?", "passage": "Anna.", "a": answers}]
    shown, _ = read(records, columns={"question": "q", "context": "passage", "answers": "a"})
    assert shown == [("Who?", ["Anna"], ["Anna."], [])]


def test_generic_context_may_be_a_list_and_may_be_missing():
    records = [
        {"question": "Who?", "context": ["Anna.", "Ben."], "answers": "Anna"},
        {"question": "Who?", "context": "", "answers": "Anna"},
        {"question": "Who?", "context": "Anna.", "answers": None},
    ]
    shown, dropped = read(records)
    assert [gold for _, _, gold, _ in shown] == [["Anna.", "Ben."]]
    assert dropped == {NO_CONTEXT: 1, NO_ANSWER: 1}


def test_flat_squad_records_are_read_under_the_name_squad():
    record = {"id": "1", "question": "Who?", "context": "Anna.", "answers": {"text": ["Anna"], "answer_start": [0]}}
    assert len(read([record], layout="squad")[0]) == 1


@pytest.mark.parametrize(
    "records, layout",
    [
        ([squad(qa("Who?", "Anna")), {"paragraphs": [{"context": "c"}]}], "squad"),
        ([HOTPOT, HOTPOT | {"context": {"title": ["A"], "sentences": []}}], "hotpotqa"),
        (
            [{"question": "q", "context": "c", "answers": "a"}, {"question": "q", "context": "c", "answers": [7.5]}],
            "generic",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named(records, layout):
    with pytest.raises(DataError, match=f"f.json: record 1 does not fit data.format {layout}, which expects"):
        read(records)


@pytest.mark.parametrize("value, expected", [(0, "0"), (7, "7"), ([0, "zero"], "0"), ({"text": [0]}, "0")])
def test_whole_numbers_are_answers(value, expected):
    [(_, answers, _, _)], dropped = read([{"question": "How many?", "context": "None.", "answers": value}])
    assert answers[0] == expected and not dropped


@pytest.mark.parametrize("value", [False, [True], 3.1, {"text": [0.5]}])
def test_answers_that_can_be_written_in_several_ways_are_refused(value):
    good = {"question": "Is it?", "context": "It is.", "answers": "yes"}
    with pytest.raises(DataError) as caught:
        read([good, good | {"answers": value}])
    for part in ("f.json: record 1", "the answer", str(value if not isinstance(value, (list, dict)) else ""), "quotes"):
        assert part in str(caught.value)
    assert "Error" not in str(caught.value)


def test_fields_that_are_missing_are_told_without_an_exception_class():
    with pytest.raises(DataError, match=r"record 1 .* a field is missing") as caught:
        read([squad(qa("Who?", "Anna")), {"paragraphs": [{"context": "c"}]}])
    assert "Error" not in str(caught.value)


def test_passages_in_another_writing_are_one():
    records = [squad(qa("A?", "a"), context=text) for text in ("Straße  in\r\nBern ①.", "STRASSE in Bern 1.", "Other.")]
    passages = DistinctTexts()
    found = read_questions(records, "squad", {}, "f", passages, Counter())
    assert [question.gold for question in found] == [(0,), (0,), (1,)] and passages.rewritten == 1


def test_a_list_without_titles_is_pages():
    records = [{"question": "Who?", "context": context, "answers": "Anna"} for context in (["one", "two"], "one")]
    found = read_questions(records, "generic", {}, "f", DistinctTexts(), Counter())
    assert [question.pages for question in found] == [True, False]
