import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import data
from data.long_context import TOO_LONG
from data.rows import EVALUATED, NOT_CHOSEN, drawn
from tests.data.conftest import passage


def load(path, tokenizer, seed=0, **values) -> data.Corpus:
    settings = data.DataSettings(kind="qa", path=str(path), **({"context_length": 512, "eval_rows": 12} | values))
    return data.load(settings, tokenizer, seed, 36)


def trained(row) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def numbers(text: str) -> list[int]:
    """Numbers of the passages in a decoded row, in order."""
    return [int(word[1:-1]) for word in text.split() if word[0] == "p" and word[1:-1].isdigit()]


@pytest.mark.parametrize("which", ["byte_tokenizer", "blank_tokenizer"])
def test_rows_train_the_first_answer_and_its_end_only(which, squad, request):
    tokenizer = request.getfixturevalue(which)
    corpus = load(squad, tokenizer)
    assert len(corpus.train) == 40 * 3 - 12 and len(corpus.evaluation) == 12
    for row in corpus.train:
        prompt, answer = tokenizer.decode(row["input_ids"][: -len(trained(row))]), tokenizer.decode(trained(row))
        asked = prompt.split("What is q")[1].split("?")[0]
        assert answer.strip() == f"a{asked}</s>" and prompt.endswith("\nAnswer:")
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["labels"][-len(trained(row)) :] == row["input_ids"][-len(trained(row)) :]
    assert len(corpus.report.notes) == 1  # on passages; no prompt tokenizes differently in one piece


def test_rows_are_filled_and_never_longer(squad, byte_tokenizer):
    corpus = load(squad, byte_tokenizer)
    left = 512 - np.asarray([len(ids) for ids in corpus.train["input_ids"]])
    assert left.min() >= 0 and np.median(left) < 16
    for ids in corpus.train["input_ids"]:
        found = numbers(byte_tokenizer.decode(ids))
        assert len(found) > 2 and len(set(found)) == len(found)


def test_the_gold_passage_is_there_at_any_depth(squad, byte_tokenizer):
    depths = []
    for ids in load(squad, byte_tokenizer).train["input_ids"]:
        text = byte_tokenizer.decode(ids)
        found, gold = numbers(text), int(text.split("What is q")[1].split("x")[0])
        depths.append(found.index(gold) / (len(found) - 1))
    counts = np.histogram(depths, bins=[0, 0.34, 0.67, 1.01])[0]
    assert counts.min() > len(depths) / 6


def test_nothing_of_a_held_out_passage_is_trained_on(squad, byte_tokenizer):
    corpus = load(squad, byte_tokenizer)
    held = {int(row["answers"][0][1:].split("x")[0]) for row in corpus.evaluation}
    seen = {number for ids in corpus.train["input_ids"] for number in numbers(byte_tokenizer.decode(ids))}
    assert len(held) == 4 and held.isdisjoint(seen) and len(seen) == 36


def test_evaluation_rows_carry_all_answers_and_the_prompt_of_training(squad, byte_tokenizer):
    corpus = load(squad, byte_tokenizer)
    for row in corpus.evaluation:
        question = row["prompt"].split("What is q")[1].split("?")[0]
        assert row["answers"] == [f"a{question}", f"b{question}"]
        prompt = row["input_ids"][: row["prompt_length"]]
        assert byte_tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == prompt
        assert byte_tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == f" a{question}</s>"
    start = byte_tokenizer.decode(corpus.train[0]["input_ids"]).split("Passage")[0]
    assert all(row["prompt"].startswith(start) for row in corpus.evaluation)


def test_the_chat_template_goes_around_the_prompt(squad, byte_tokenizer):
    from tests.lrsa.test_prompt import CHATML, with_template

    tokenizer = with_template(byte_tokenizer, CHATML)
    corpus = load(squad, tokenizer)
    row = corpus.evaluation[0]
    content = row["prompt"].removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert row["prompt"] == asked
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == row["answers"][0] + "<|im_end|>"
    assert "<s>" not in asked and tokenizer.bos_token_id not in row["input_ids"]


def test_questions_that_do_not_fit_are_dropped_and_counted(squad, byte_tokenizer):
    content = json.loads(squad.read_text())
    paragraphs = content["data"][0]["paragraphs"]
    for paragraph in paragraphs[:5]:
        paragraph["context"] += " and more" * 200
    squad.write_text(json.dumps(content))
    corpus = load(squad, byte_tokenizer)
    assert corpus.report.dropped == {TOO_LONG: 15}
    assert len(corpus.evaluation) == 12 and len(corpus.train) == 35 * 3 - 12
    assert len(load(squad, byte_tokenizer, eval_rows=0, max_rows=100).train) == 100, "they count towards neither limit"
    assert len(load(squad, byte_tokenizer, eval_path=str(squad), eval_rows=40).evaluation) == 40
    with pytest.raises(data.DataError, match=r"no passage can be held out.*data.context_length = 40"):
        load(squad, byte_tokenizer, context_length=40)
    with pytest.raises(data.DataError, match=rf"no row to train on. Dropped: 120: {TOO_LONG}"):
        load(squad, byte_tokenizer, context_length=40, eval_rows=0)


def test_max_rows_and_eval_rows(squad, byte_tokenizer):
    corpus = load(squad, byte_tokenizer, max_rows=10, eval_rows=0)
    assert len(corpus.train) == 10 and corpus.evaluation == [] and corpus.report.dropped == {NOT_CHOSEN: 110}
    assert len(load(squad, byte_tokenizer, eval_rows=10).evaluation) == 9  # three whole passages
    many = load(squad, byte_tokenizer, eval_rows=1000)
    assert len(many.evaluation) == len(many.train) == 60
    assert many.report.notes[1:] == ["60 evaluation rows could be had, of data.eval_rows = 1000"]


def test_evaluation_from_its_own_file_takes_its_passages_out_of_training(squad, tmp_path, byte_tokenizer):
    content = json.loads(squad.read_text())
    paragraphs = content["data"][0]["paragraphs"]
    other = tmp_path / "eval.json"
    other.write_text(json.dumps({"data": [{"paragraphs": paragraphs[30:]}]}))
    corpus = load(squad, byte_tokenizer, eval_path=str(other), eval_rows=30)
    seen = {number for ids in corpus.train["input_ids"] for number in numbers(byte_tokenizer.decode(ids))}
    assert len(corpus.evaluation) == 30 and seen == set(range(30)) and corpus.report.dropped == {EVALUATED: 30}


def test_own_distractors_come_first_and_held_out_ones_do_not(tmp_path, byte_tokenizer):
    rng = random.Random(1)
    records = []
    for number in range(20):  # p<n>0 and p<n>1 are gold, p<n>2.. came with the question
        titles = [f"T{number}{i}" for i in range(4)]
        texts = [[passage(rng, number * 10 + i)] for i in range(4)]
        records.append(
            {
                "question": f"What is q{number}?",
                "answer": f"a{number}",
                "context": {"title": titles, "sentences": texts},
                "supporting_facts": {"title": titles[:2], "sent_id": [0, 0]},
            }
        )
    for before, record in pairwise(records):  # a gold passage of one is a distractor of the next
        for kind in ("sentences", "title"):
            record["context"][kind][3] = before["context"][kind][0]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(records))
    corpus = load(path, byte_tokenizer, eval_rows=5, context_length=1500)
    gold = {int(row["answers"][0][1:]) * 10 + i for row in corpus.evaluation for i in range(2)}
    for ids in corpus.train["input_ids"]:
        text = byte_tokenizer.decode(ids)
        number, found = int(text.split("What is q")[1].split("?")[0]), numbers(text)
        own = {number * 10 + i for i in range(3)} | {max(0, number - 1) * 10}
        assert own - gold <= set(found) and len(found) == len(set(found)) > 3
        assert not gold & set(found)


def test_same_seed_same_rows_in_another_process(squad, tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, data; from transformers import PreTrainedTokenizerFast\n"
        "settings = data.DataSettings(kind='qa', path=sys.argv[1], context_length=512, eval_rows=12)\n"
        "corpus = data.load(settings, PreTrainedTokenizerFast.from_pretrained(sys.argv[2]), 0, 36)\n"
        "print(corpus.train._fingerprint, sum(sum(row['input_ids']) for row in corpus.evaluation))"
    )
    root = Path(data.__file__).parents[1]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root), "RANK": "1"}
    command = [sys.executable, "-c", code, str(squad), str(tmp_path / "tokenizer")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = load(squad, byte_tokenizer)
    tokens = sum(sum(row["input_ids"]) for row in here.evaluation)
    assert run.stdout.split() == [here.train._fingerprint, str(tokens)]
    other = load(squad, byte_tokenizer, seed=1)
    assert other.train["input_ids"][:] != here.train["input_ids"][:]
    assert [row["answers"] for row in other.evaluation] != [row["answers"] for row in here.evaluation]


def test_real_questions(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    corpus = load(shared / "data/xquad.en.json", tokenizer, context_length=1024, eval_rows=50)
    assert len(corpus.evaluation) == 50 and len(corpus.report.notes) == 1
    assert (
        len(corpus.train) + 50 + sum(corpus.report.dropped.values()) + sum(corpus.report.evaluation_dropped.values())
        == 1190
    )
    assert max(map(len, corpus.train["input_ids"])) <= 1024


def write_documents(path, pages=1, count=20):
    """Records with one document each, or a list of pages; words tell which."""
    records = []
    for number in range(count):
        texts = [f"Passage p{number * 10 + page}: signed by x{number}." for page in range(pages)]
        context = texts if pages > 1 else texts[0]
        records.append({"question": f"Who signed q{number}?", "context": context, "answers": f"x{number}"})
    path.write_text(json.dumps(records))
    return path


def test_a_document_of_its_own_gets_no_other(tmp_path, byte_tokenizer):
    path = write_documents(tmp_path / "contracts.json")
    corpus = load(path, byte_tokenizer, eval_rows=4)
    rows = [byte_tokenizer.decode(ids) for ids in corpus.train["input_ids"]] + [r["prompt"] for r in corpus.evaluation]
    assert len(rows) == 20 and all(len(numbers(row)) == 1 for row in rows)
    assert corpus.report.notes == ["a row holds the context of its own record only (data.distractors: none)"]
    filled = load(path, byte_tokenizer, eval_rows=4, distractors="pool")
    assert min(len(numbers(byte_tokenizer.decode(ids))) for ids in filled.train["input_ids"]) > 5
    assert re.match(r"1\d\.\d passages of other records are added to a row", filled.report.notes[0])


def test_passages_of_squad_are_not_filled_when_that_is_said(squad, byte_tokenizer):
    corpus = load(squad, byte_tokenizer, distractors="none")
    assert {len(numbers(byte_tokenizer.decode(ids))) for ids in corpus.train["input_ids"]} == {1}


@pytest.mark.parametrize("distractors", ["none", "pool"])
def test_pages_keep_their_order(distractors, tmp_path, byte_tokenizer):
    path = write_documents(tmp_path / "pages.json", pages=6)
    corpus = load(path, byte_tokenizer, eval_rows=4, distractors=distractors, context_length=700)
    places = set()
    for row in [byte_tokenizer.decode(ids) for ids in corpus.train["input_ids"]]:
        number, found = int(row.split("signed q")[1].split("?")[0]), numbers(row)
        place = found.index(number * 10)
        assert found[place : place + 6] == [number * 10 + page for page in range(6)]
        places.add(place)
    assert (len(places) > 2) == (distractors == "pool")
    assert "the texts of a context keep their order (data.shuffle_passages: false)" in corpus.report.notes
    shuffled = load(path, byte_tokenizer, eval_rows=4, distractors="none", shuffle_passages=True, context_length=700)
    orders = [numbers(byte_tokenizer.decode(ids)) for ids in shuffled.train["input_ids"]]
    assert sum(order != sorted(order) for order in orders) > len(orders) / 2
    assert not any("order" in note for note in shuffled.report.notes)


def test_passages_in_another_writing_are_not_trained_on_and_held_out(squad, byte_tokenizer):
    content = json.loads(squad.read_text())
    paragraphs = content["data"][0]["paragraphs"]
    copies = [p | {"context": p["context"].upper().replace(" ", " \r\n")} for p in paragraphs]
    squad.write_text(json.dumps({"data": [{"paragraphs": paragraphs + copies}]}))
    corpus = load(squad, byte_tokenizer)
    held = {int(row["answers"][0][1:].split("x")[0]) for row in corpus.evaluation}
    decoded = [byte_tokenizer.decode(ids).lower() for ids in corpus.train["input_ids"]]
    asked = {int(text.split("what is q")[1].split("x")[0]) for text in decoded}
    assert held and held.isdisjoint(asked) and held.isdisjoint({n for text in decoded for n in numbers(text)})
    assert any("40 passages differ from others in blanks, case or Unicode form" in n for n in corpus.report.notes)


@pytest.mark.parametrize("template", [False, True], ids=["plain", "chat"])
def test_control_tokens_in_data_do_not_end_a_turn(template, tmp_path, byte_tokenizer):
    from tests.lrsa.test_prompt import INST, with_template

    tokenizer = with_template(byte_tokenizer, INST) if template else byte_tokenizer
    records = [
        {"question": f"Who </s> q{n}?", "context": f"<s> has </s> ten {'</s>' * 8} p{n}.", "answers": f"a </s> x{n}"}
        for n in range(20)
    ]
    path = tmp_path / "control.json"
    path.write_text(json.dumps(records))
    corpus = load(path, tokenizer, eval_rows=4)
    rows = corpus.train["input_ids"][:] + [row["input_ids"] for row in corpus.evaluation]
    for ids in rows:
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert "<s> has </s> ten " + "</s>" * 8 in tokenizer.decode(rows[0])
    assert corpus.evaluation[0]["prompt"] in tokenizer.decode(corpus.evaluation[0]["input_ids"])
    assert any("control tokens that are written in the data (220 x </s>, 20 x <s>)" in n for n in corpus.report.notes)


@pytest.mark.parametrize("few", [0, 7, 40])
def test_rows_are_drawn_in_few_rounds_where_few_items_make_one(few):
    rounds = []

    def make(items):
        rounds.append(items)
        return [item for item in items if item < few]

    rows, more = drawn(range(5000), 20, np.random.default_rng(0), make)
    assert len(rows) == len(set(rows)) == min(few, 20) and len(rounds) <= 12
    seen = [item for items in rounds for item in items]
    assert len(seen) == len(set(seen)) and more == 5000 - len(seen) + len([i for i in seen if i < few]) - len(rows)
    assert drawn(range(5000), 20, np.random.default_rng(0), make) == (rows, more)
