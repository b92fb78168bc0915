"""Rows that ask several questions about their passages (data.questions_per_row)."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
import pytest
import trl

import data
from lrsa.prompt import chat_template
from tests.data.test_question_answering import load, numbers
from tests.lrsa.test_prompt import CHATML, with_template

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("which", ["byte_tokenizer", "blank_tokenizer"])
def test_a_row_asks_several_questions_about_its_passages(which, squad, request):
    tokenizer = request.getfixturevalue(which)
    corpus, one = load(squad, tokenizer, questions_per_row=4), load(squad, tokenizer)
    counts = []
    for row in corpus.train:
        text = tokenizer.decode(row["input_ids"])
        asked = re.findall(r"What is q(\d+)x(\d)\?\nAnswer: (\S+?)</s>", text)
        assert len(set(asked)) == len(asked) and all(said == f"a{number}x{i}" for number, i, said in asked)
        assert {int(number) for number, _, _ in asked} <= set(numbers(text))
        said = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert re.findall(r"a\d+x\d", said) == [answer for *_, answer in asked] and "What" not in said
        assert len(row["input_ids"]) <= 512
        counts.append(len(asked))
    assert max(counts) == 4 and np.mean(counts) > 3.5
    assert corpus.evaluation == one.evaluation
    assert any("questions on average" in note for note in corpus.report.notes)
    assert not any("questions on average" in note for note in one.report.notes)


def rendered(tokenizer, *conversations) -> Iterator[str]:
    """Each conversation, as far as the template can read it: some want parts, some texts."""
    for messages in conversations:
        with contextlib.suppress(jinja2.TemplateError, TypeError):
            yield tokenizer.apply_chat_template(messages, chat_template=chat_template(tokenizer), tokenize=False)


def test_further_questions_stand_as_the_chat_template_writes_them(squad, byte_tokenizer):
    right = 0
    for template in [CHATML, *(path.read_text(encoding="utf-8") for path in TEMPLATES[::3])]:
        tokenizer = with_template(byte_tokenizer, template)
        try:
            ids = load(squad, tokenizer, questions_per_row=3, context_length=900, max_rows=1).train[0]["input_ids"]
        except data.DataError as error:
            assert "chat template" in str(error)
            continue
        text = tokenizer.decode(ids)
        begin, *names = text.index("Read"), *re.findall(r"What is q(\d+x\d)", text)
        said = [part for name in names for part in (f"What is q{name}?\nAnswer:", f"a{name}")]
        content = text[begin : text.index(said[0])] + said[0]
        questions = [content, *(f"Question: {part}" for part in said[2::2])]
        pairs = zip(questions, said[1::2], strict=True)
        messages = [
            {"role": role, "content": part}
            for pair in pairs
            for role, part in zip(("user", "assistant"), pair, strict=True)
        ]
        parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        assert len(names) == 3 and text.strip() in {whole.strip() for whole in rendered(tokenizer, messages, parts)}
        right += 1
    assert right > 5


def test_several_questions_are_refused_where_a_template_asks_first(squad, byte_tokenizer):
    with pytest.raises(data.DataError, match=r"data\.questions_per_row: 1"):
        load(squad, byte_tokenizer, questions_per_row=2, prompt_template="{question}\n\n{context}\n\nAnswer:")


def test_no_question_is_asked_twice_whatever_its_answers(tmp_path, byte_tokenizer):
    records = [{"question": "Who?", "context": "Anna and Ben.", "answers": answer} for answer in ("Anna", "Ben")]
    (tmp_path / "two.json").write_text(json.dumps(records))
    corpus = load(tmp_path / "two.json", byte_tokenizer, questions_per_row=2, eval_rows=0)
    assert [byte_tokenizer.decode(row["input_ids"]).count("Who?") for row in corpus.train] == [1, 1]


def test_rows_are_filled_where_there_are_no_further_questions(squad, byte_tokenizer):
    one, several = (load(squad, byte_tokenizer, questions_per_row=most, max_rows=20) for most in (1, 30))
    assert np.median([len(ids) for ids in several.train["input_ids"]]) > 490
    assert np.median([len(ids) for ids in one.train["input_ids"]]) > 490
