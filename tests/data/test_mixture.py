"""Several sources in one run, and rows that are made as they are needed."""

import json
import os
from itertools import islice

import pytest

import data
from data import mixture
from tests.data.chat.test_rows import chat, chatml  # noqa: F401
from tests.tiny_run import ROOT
from train.settings.sources import parse


def document(number: int) -> str:
    return f"document {number} " + "fox " * (number % 9)


@pytest.fixture
def files(tmp_path):
    qa = [{"question": f"Who {n}?", "context": f"Anna {n}.", "answers": "Anna"} for n in range(40)]
    records = {
        "qa.jsonl": qa,
        "chats.jsonl": [chat(f"number {n}", f"answer {n}") for n in range(30)],
        "texts.jsonl": [{"text": document(n)} for n in range(50)],
        "more.jsonl": [{"text": document(n)} for n in range(40, 60)],  # ten of them are in texts.jsonl as well
    }
    for name, lines in records.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name.partition(".")[0]: str(tmp_path / name) for name in records}


def load(tokenizer, sources, seed=0, **values) -> data.Corpus:
    settings = data.DataSettings(sources=sources, context_length=200, **values)
    return data.load(settings, tokenizer, seed, 36)


def texts(tokenizer, rows) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]


def sources_of(files) -> list[dict]:
    return [
        {"kind": "qa", "path": files["qa"], "eval_rows": 4},
        {"kind": "chat", "path": files["chats"], "eval_rows": 3},
        {"kind": "text", "path": files["texts"], "eval_rows": 5},
        {"kind": "synthetic", "eval_rows": 2, "synthetic": {"rows": 10, "keys": 2}},
    ]


def test_without_weights_every_row_of_every_kind_is_used_once(files, chatml):  # noqa: F811
    corpus = load(chatml, sources_of(files))
    assert len(corpus.train) == 36 + 27 + 45 + 10 == corpus.report.rows
    names = [row["source"] for row in corpus.evaluation]
    assert {name: names.count(name) for name in names} == {
        "qa.jsonl": 4, "chats.jsonl": 3, "texts.jsonl": 5, "synthetic key_value": 2,
    }  # fmt: skip
    assert [line.partition(" of ")[0] for line in corpus.report.sources] == [
        "qa.jsonl: qa, 36", "chats.jsonl: chat, 27", "texts.jsonl: text, 45", "synthetic key_value: synthetic, 10",
    ]  # fmt: skip
    assert "before its own" not in str(corpus.report.notes) and corpus.report.kind == "qa + chat + text + synthetic"
    assert any(note.startswith("texts.jsonl: the end of every document is trained") for note in corpus.report.notes)
    assert corpus.prompt.before == "<|im_start|>user\n", "text has no say in it"


@pytest.mark.parametrize("strategy, rows", [("first_exhausted", (27, 140)), ("all_exhausted", (120, 400))])
def test_weights_are_the_shares_of_the_rows(strategy, rows, files, chatml):  # noqa: F811
    qa, chats, text, _ = sources_of(files)
    weighted = [qa | {"weight": 1.0}, chats | {"weight": 2.0}, text | {"weight": 1}]
    corpus = load(chatml, weighted, stopping_strategy=strategy)
    kinds = ["assistant" in row and "Who" not in row and 1 for row in texts(chatml, corpus.train["input_ids"])]
    assert rows[0] <= len(kinds) <= rows[1] and 0.35 < sum(map(bool, kinds)) / len(kinds) < 0.65
    seen = texts(chatml, corpus.train["input_ids"])
    assert (len(set(seen)) == len(seen)) == (strategy == "first_exhausted")
    assert load(chatml, weighted, stopping_strategy=strategy).report.fingerprints == corpus.report.fingerprints


@pytest.mark.parametrize("streaming", [False, True])
def test_what_one_source_evaluates_no_other_trains_on(streaming, files, byte_tokenizer):
    sources = [{"kind": "text", "path": files[name], "eval_rows": 8, "weight": 1} for name in ("texts", "more")]
    corpus = load(byte_tokenizer, sources, streaming=streaming, stopping_strategy="all_exhausted")
    held = set(texts(byte_tokenizer, [row["input_ids"] for row in corpus.evaluation]))
    rows = islice(corpus.train, 300) if streaming else corpus.train
    trained = set(texts(byte_tokenizer, [row["input_ids"] for row in rows]))
    shared = {document(n).strip() for n in range(40, 50)}
    assert held & shared, "otherwise the test shows nothing"
    assert held.isdisjoint(trained) and len(held | trained) == 60


def test_parts_of_documents_that_one_source_evaluates_are_trained_on_in_no_other(files, tmp_path, byte_tokenizer):
    long = " ".join(f"fox{n}" for n in range(200))
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "also.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "a short one")))
    one = {"kind": "text", "path": str(tmp_path / "long.txt"), "eval_rows": 1}
    corpus = load(byte_tokenizer, [one, {"kind": "text", "path": str(tmp_path / "also.jsonl"), "eval_rows": 0}])
    [held] = corpus.evaluation
    assert held["input_ids"] not in list(corpus.train["input_ids"]) and len(corpus.train) == 4


@pytest.mark.parametrize("kind", ["qa", "chat", "text", "synthetic"])
def test_a_stream_has_the_rows_of_all_blocks_in_order(kind, files, chatml, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mixture, "BLOCK", 8)
    [source] = [one for one in sources_of(files) if one["kind"] == kind]
    settings = data.DataSettings(**source | {"eval_rows": 2}, context_length=200, streaming=True)
    corpus = data.load(settings, chatml, 0, 36)
    first, again = ([row["input_ids"] for row in corpus.train] for _ in range(2))
    assert first == again and corpus.report.streaming and len(corpus.evaluation) == 2
    assert len(first) == {"qa": 38, "chat": 28, "text": 48, "synthetic": 10}[kind]
    assert corpus.report.rows == {"synthetic": 8}.get(kind, 6), "the report is about the first block"
    if kind == "text":
        order = [int(text.split()[1]) for text in texts(chatml, first)]
        assert order[6:] == list(range(8, 50)), "in the order of the file, but for what was held out"
    stream = iter(corpus.train)
    state = [next(stream) for _ in range(9)] and corpus.train.state_dict()
    corpus.train.load_state_dict(state)
    assert [row["input_ids"] for row in corpus.train] == first[9:], "it resumes at the row"


def test_a_stream_makes_its_first_block_once_and_reads_no_evaluation_rows_again(files, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 8)
    settings = data.DataSettings(
        kind="text", path=files["texts"], eval_path=files["more"], context_length=200, streaming=True
    )
    source = mixture.Source("texts", settings, byte_tokenizer, 0)
    rows = [row.input_ids.tolist() for row in source.stream()]
    os.remove(files["more"])
    assert [row.input_ids.tolist() for row in source.stream()] == rows and len(rows) == 40
    assert next(source.stream()) is source.rows.train[0]


def test_a_stream_may_have_a_block_without_a_row(files, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 4)
    records = [{"prompt": f"{n}?", "completion": "" if 4 <= n < 8 else f"answer {n}"} for n in range(12)]
    with open(files["chats"], "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    settings = data.DataSettings(kind="chat", path=files["chats"], context_length=200, streaming=True, eval_rows=1)
    assert not byte_tokenizer.chat_template
    assert len(list(mixture.Source("chats", settings, byte_tokenizer, 0).stream())) == 7


def test_a_stream_does_not_turn_from_texts_to_messages(files, chatml, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mixture, "BLOCK", 4)
    with open(files["chats"], "w") as file:
        records = [{"prompt": f"{n}?", "completion": f"answer {n}"} for n in range(4)] + [chat("a", "b")]
        file.writelines(json.dumps(record) + "\n" for record in records)
    settings = data.DataSettings(kind="chat", path=files["chats"], context_length=200, streaming=True, eval_rows=1)
    with pytest.raises(data.DataError, match="among the records from 4 on"):
        list(mixture.Source("chats", settings, chatml, 0).stream())


def test_a_stream_reads_no_further_than_it_is_asked(files, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 8)
    with open(files["texts"], "a") as file:
        file.write('{"text": 3}\n')
    settings = data.DataSettings(kind="text", path=files["texts"], streaming=True, eval_rows=2, context_length=200)
    stream = iter(data.load(settings, byte_tokenizer, 0, 36).train)
    assert len(list(islice(stream, 40))) == 40
    with pytest.raises(data.DataError, match="record 50 holds no text in column 'text', but 3"):
        list(stream)


@pytest.mark.parametrize(
    "values, part",
    [
        ({}, "kind must be set (one of qa, chat, text, synthetic), or sources with a kind each"),
        ({"kind": "text", "path": "a"}, "with sources, kind, path must be set in each of them"),
        ({"sources": [{"kind": "text", "path": "a", "weight": 1}, {"kind": "text", "path": "b"}]},
         "weight must be set for all of them or for none, missing in 1"),
        ({"streaming": True}, "streaming several sources needs a weight for each"),
    ],
)  # fmt: skip
def test_sources_that_do_not_go_together(values, part):
    two = [{"kind": "text", "path": "a.txt"}, {"kind": "text", "path": "b.txt"}]
    with pytest.raises(ValueError) as caught:
        data.DataSettings(**({"sources": two} if values and "sources" not in values else {}) | values)
    assert part in str(caught.value)


def test_the_example_of_the_documents_is_right():
    text = (ROOT / "docs" / "data.md").read_text().split("```yaml\n")[1].split("```")[0]
    sources = data.DataSettings(**parse(text).values["data"]).each()
    assert [*sources] == ["*.jsonl", "questions.json", "book.txt and 1 more"]
