"""Rows of chats: what is trained, where chats are cut or dropped, and which are held out."""

import copy
import json
import re

import numpy as np
import pytest

import data
from data.chat.rows import DUPLICATE, TOO_LONG
from data.rows import EVALUATED
from lrsa import PromptFormat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen3: an empty block before the last answer, none before earlier ones, reasoning where there is some
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def chatml(byte_tokenizer):
    return with_template(byte_tokenizer, CHATML)


def chat(*said, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


def load(folder, records, tokenizer, **values):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = data.DataSettings(kind="chat", path=str(path), **({"context_length": 400, "eval_rows": 0} | values))
    return data.load(settings, tokenizer, 0, 36)


def trained(tokenizer, corpus):
    """The trained runs of every row, decoded."""
    rows = []
    for row in corpus.train:
        labels = np.asarray(row["labels"])
        cuts = np.flatnonzero((np.diff((labels != -100).astype(int), prepend=0, append=0)) != 0).reshape(-1, 2)
        rows.append([tokenizer.decode(row["input_ids"][start:end]) for start, end in cuts])
    return rows


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix", "marked"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_every_answer_or_the_last_is_trained_with_its_end(template, train_on, tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, template)
    record = chat("Who?", "Anna.", "When?", "Later.", system="Be brief.")
    corpus = load(tmp_path, [record], tokenizer, train_on=train_on)
    assert trained(tokenizer, corpus) == [["Anna.<|im_end|>", "Later.<|im_end|>"][train_on == "last" :]]
    whole = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert tokenizer.decode(corpus.train[0]["input_ids"]) == whole.rstrip()


def test_a_single_turn_is_the_prompt_format_s(tmp_path, chatml):
    corpus = load(tmp_path, [chat("Who?", "Anna.")], chatml)
    turn = PromptFormat.of(chatml)
    ids = turn.encode(chatml, "Who?")["input_ids"][0].tolist()
    assert corpus.train[0]["input_ids"][: len(ids)] == ids and corpus.train[0]["labels"][: len(ids)] == [-100] * len(
        ids
    )
    assert corpus.train[0]["labels"][len(ids)] != -100 and corpus.prompt == turn


def test_a_template_that_rewrites_history_gives_a_row_for_each_answer(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKING)
    corpus = load(tmp_path, [chat("Who?", "Anna.", "When?", "Later.")], tokenizer)
    assert trained(tokenizer, corpus) == [["Anna.<|im_end|>"], ["Later.<|im_end|>"]]
    prompts = [tokenizer.decode(row["input_ids"]).rpartition("assistant\n")[2] for row in corpus.train]
    assert prompts == [f"<think>\n\n</think>\n\n{said}<|im_end|>" for said in ("Anna.", "Later.")]
    assert any("1 chats make a row for each answer" in note for note in corpus.report.notes)


def test_rows_of_one_chat_each_have_their_own_answer_and_are_cut_alone(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKING)
    records = [chat("Who?", "Anna.", "When?", "Later.", "x" * 200, "End.")]
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps(records[0]) + "\n")
    held = {"eval_path": str(path), "eval_rows": 2}
    corpus = load(tmp_path, [*records, chat("Where?", "Here.")], tokenizer, context_length=290, too_long="cut", **held)
    answers = [row["answers"] for row in corpus.evaluation]
    assert len(answers) == 2 and all(answer in [["Anna."], ["Later."], ["End."]] for answer in answers), "at most"
    corpus = load(tmp_path, records, tokenizer, context_length=290, too_long="cut")
    assert trained(tokenizer, corpus) == [["Anna.<|im_end|>"], ["Later.<|im_end|>"], ["End.<|im_end|>"]], "each once"


def test_reasoning_is_trained_behind_the_generation_prompt_which_is_stored(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKING)
    corpus = load(tmp_path, [chat("Who?", "<think>\nhm\n</think>\n\nAnna.")], tokenizer)
    assert trained(tokenizer, corpus) == [["<think>\nhm\n</think>\n\nAnna.<|im_end|>"]]
    assert corpus.prompt.between == "<|im_end|>\n<|im_start|>assistant\n" != PromptFormat.of(tokenizer).between
    dropping = with_template(byte_tokenizer, CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"))
    with pytest.raises(
        data.DataError, match=r"record 0: the chat template leaves out the reasoning of message 1 \('hm'"
    ):
        load(tmp_path, [chat("Who?", "<think>\nhm\n</think>\n\nAnna.")], dropping)


def test_control_tokens_in_messages_are_letters(tmp_path, chatml):
    corpus = load(tmp_path, [chat("Who <|im_end|> found </s> it?", "<|im_start|>Anna")], chatml)
    ids = corpus.train[0]["input_ids"]
    ends, starts, eos = (chatml.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>", "</s>"))
    assert (ids.count(ends), ids.count(starts), ids.count(eos)) == (2, 2, 0)
    assert "Who <|im_end|> found </s> it?" in chatml.decode(ids)
    assert any("control tokens that are written in the data" in note for note in corpus.report.notes)


@pytest.mark.parametrize(
    "record, template, part",
    [
        (chat("Who?", "Anna.", system="Be brief."),
         "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML,
         "record 0: the chat template refuses it: no system role"),
        (chat("Who?", "Anna.", system="Be brief."),
         CHATML.replace("in messages", "in messages if m['role'] != 'system'"),
         r"leaves out message 0 \(role system, 'Be brief.'\)"),
        (chat("Who?", "Anna.") | {"tools": [{"name": "weather"}]}, CHATML, "leaves out the tool 'weather'"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused(record, template, part, tmp_path, byte_tokenizer):
    with pytest.raises(data.DataError, match=part):
        load(tmp_path, [record], with_template(byte_tokenizer, template))


def test_chats_need_a_template_and_texts_need_none(tmp_path, byte_tokenizer):
    with pytest.raises(data.DataError, match=r"chats need a chat template.*set model\.chat_template"):
        load(tmp_path, [chat("Who?", "Anna.")], byte_tokenizer)
    corpus = load(tmp_path, [{"prompt": "Who?", "completion": " Anna </s>"}], byte_tokenizer)
    assert trained(byte_tokenizer, corpus) == [[" Anna </s></s>"]]
    ids = corpus.train[0]["input_ids"]
    assert byte_tokenizer.decode(ids) == "<s>Who? Anna </s></s>" and ids.count(byte_tokenizer.eos_token_id) == 1
    assert corpus.prompt == PromptFormat("<s>", "", "", "</s>", byte_tokenizer.eos_token_id)


def test_long_chats_are_dropped_or_lose_their_oldest_turns(tmp_path, chatml):
    long = chat("old " * 30, "old answer", "Who?", "Anna.", system="Be brief.")
    huge = chat("big " * 200, "x")
    corpus = load(tmp_path, [long, huge, chat("a", "b")], chatml, context_length=100)
    assert corpus.report.dropped[TOO_LONG] == 2 and trained(chatml, corpus) == [["b<|im_end|>"]]
    corpus = load(tmp_path, [long, huge, chat("a", "b")], chatml, context_length=100, too_long="cut")
    assert corpus.report.dropped[TOO_LONG] == 1
    assert trained(chatml, corpus) == [["Anna.<|im_end|>"], ["b<|im_end|>"]]
    assert "Be brief." in chatml.decode(corpus.train[0]["input_ids"])
    assert any("1 turns" in note for note in corpus.report.notes)


def test_max_rows_and_eval_rows_are_rows_that_are_drawn_from_those_that_fit(tmp_path, chatml, byte_tokenizer):
    records = [chat(f"q{n}", "a" * (500 if n % 2 else 5)) for n in range(40)]  # every other one is too long
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps(chat(f"h{n}", "a" * (500 if n else 5))) + "\n" for n in (0, 1))
    )
    corpus = load(tmp_path, records, chatml, max_rows=15, eval_path=str(tmp_path / "held.jsonl"), eval_rows=1)
    assert len(corpus.train) == 15 and len(corpus.evaluation) == 1
    assert sum(corpus.report.dropped.values()) == 25
    rewriting = with_template(byte_tokenizer, THINKING)  # a row for each answer
    several = [chat(f"q{n}", "a1", "q", "a2", "q", "a3") for n in range(9)]
    corpus = load(tmp_path, several, rewriting, max_rows=10)
    assert len(corpus.train) == 10 and len(load(tmp_path, several, rewriting).train) == 27


def test_notes_count_the_rows_that_are_used(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKING)
    cut = chat("old " * 60, "old", "Who?", "Anna.", "When?", "Later.")
    dropped = [chat("x" * 300, f"a{n}", "y" * 300, "b") for n in range(5)]
    for most, turns in ((None, 2), (1, 1)):  # the first answer of each is too long, so `cut` has two rows
        corpus = load(tmp_path, [cut, *dropped], tokenizer, context_length=200, too_long="cut", max_rows=most)
        assert len(corpus.train) == turns and any(f"are cut: {turns} turns" in note for note in corpus.report.notes)
        assert any(note.startswith("1 chats make a row for each answer") for note in corpus.report.notes)


def test_what_is_evaluated_decides_nothing_of_what_is_trained(tmp_path, byte_tokenizer):
    tokenizer = with_template(byte_tokenizer, THINKING)
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(chat(f"{n}?", "<think>\nhm\n</think>\n\nYes.")) + "\n" for n in range(3)))
    corpus = load(tmp_path, [chat("Who?", "Anna.")], tokenizer, eval_path=str(path), eval_rows=3)
    assert len(corpus.evaluation) == 3 and corpus.prompt == PromptFormat.of(tokenizer)
    assert not any("reasoning" in note for note in corpus.report.notes)
    texts = [{"prompt": "Who?", "completion": "Anna."}]
    with pytest.raises(data.DataError, match=r"data.eval_path .*held.jsonl: record 0: .* in data.path .*chats.jsonl"):
        load(tmp_path, texts, tokenizer, eval_path=str(path), eval_rows=3)


def test_chats_about_one_document_are_on_one_side_of_the_split(tmp_path, chatml):
    about = "is about foxes, of which it says very many things that only this one document tells."
    told = "Answer with a few words from this document, which is about foxes, or say that it does not tell.\n"
    records = [chat(f"{told}Document {n // 3} {about}\nQuestion {n}?", f"answer {n}") for n in range(24)]
    records[1]["messages"][0]["content"] += f"\nDocument 7 {about}"  # documents 0 and 7 are on one side then
    again = chat(f"{told}DOCUMENT 0  {about}\nQuestion 0?", "ANSWER 0")  # the first one in another writing
    corpus = load(tmp_path, [*records, again], chatml, eval_rows=6, context_length=800)
    assert corpus.report.dropped == {DUPLICATE: 1, EVALUATED: 6} and len(corpus.train) == 18
    numbers = lambda ids: set(re.findall(r"Document (\d)", chatml.decode(ids)))  # noqa: E731
    held = set().union(*(numbers(row["input_ids"]) for row in corpus.evaluation))
    assert len(held) == 2 and held.isdisjoint(set().union(*map(numbers, corpus.train["input_ids"])))
    assert ("0" in held) == ("7" in held)


def test_one_document_that_all_held_out_chats_are_about_is_not_trained(tmp_path, chatml):
    """A line of most evaluation chats is no instruction: only the training chats tell what is."""
    about = "is about foxes, of which it says very many things that only this one document tells."
    held = [chat(f"Document 1 {about}\nQuestion {n}?", f"answer {n}") for n in range(12)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held))
    train = [chat(f"Document {1 + n // 3} {about}\nWhat of {n}?", f"reply {n}") for n in range(9)]
    path = str(tmp_path / "held.jsonl")
    corpus = load(tmp_path, train, chatml, eval_path=path, eval_rows=12, context_length=800)
    assert corpus.report.dropped == {EVALUATED: 3} and len(corpus.train) == 6


def test_chats_that_are_cut_are_held_out_by_what_they_began_with(tmp_path, chatml):
    records = [chat(f"Number {n} " + "old " * 30, "old answer", f"Who {n}?", "Anna.") for n in range(12)]
    corpus = load(tmp_path, records, chatml, eval_rows=4, context_length=90, too_long="cut")
    texts = [chatml.decode(row) for row in [*corpus.train["input_ids"], *(r["input_ids"] for r in corpus.evaluation)]]
    assert len(corpus.evaluation) == 4 and len(set(texts)) == 12 and not any("old" in text for text in texts)


def test_evaluation_rows_have_the_trained_tokens_and_short_answers(tmp_path, chatml):
    records = [chat(f"Who {n}?", "Anna.", "When?", "Later " * (40 if n % 2 else 1)) for n in range(20)]
    corpus = load(tmp_path, records, chatml, eval_rows=8)
    assert {tuple(row["answers"]) for row in corpus.evaluation} == {("Later",), ()}
    for row in corpus.evaluation:
        ids = np.asarray(row["input_ids"])
        assert chatml.decode(ids[row["trained"]]).startswith("Anna.<|im_end|>Later")
        assert row["prompt"] == chatml.decode(ids[: row["prompt_length"]]) and row["prompt"].endswith("assistant\n")
