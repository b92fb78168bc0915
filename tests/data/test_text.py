import copy
import json

import pytest

import data
from data.rows import EVALUATED
from data.text import DUPLICATE, EMPTY, REWRITTEN, TOO_SHORT

BOS, EOS = 0, 1


@pytest.fixture
def documents(tmp_path):
    """30 different documents of 5 to 34 words with their number in every word, so each token run tells its document."""
    texts = [" ".join(f"d{number}w{word}" for word in range(5 + number)) for number in range(30)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def load(path, tokenizer, **values) -> data.Corpus:
    settings = data.DataSettings(kind="text", path=str(path), **({"context_length": 64, "eval_rows": 6} | values))
    return data.load(settings, tokenizer, 0, 36)


def sources(tokenizer, ids) -> set[str]:
    """Numbers of the documents whose words are whole in a row."""
    words = tokenizer.decode(ids, skip_special_tokens=True).split()
    return {word[1:].split("w")[0] for word in words[1:-1] if word.startswith("d") and "w" in word}


def test_each_row_is_bos_and_a_piece_of_one_document(documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer)
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    rows = corpus.train["input_ids"][:] + [row["input_ids"] for row in corpus.evaluation]
    assert byte_tokenizer.bos_token_id == BOS and byte_tokenizer.eos_token_id == 1
    for ids in rows:
        assert ids[0] == BOS and ids.count(BOS) == 1 and EOS not in ids[:-1] and 3 <= len(ids) <= 64
        assert any(byte_tokenizer.decode(ids[1:]) in text + "</s>" for text in texts)
    assert any(len(ids) == 64 for ids in rows)
    assert corpus.train["labels"][:] == corpus.train["input_ids"][:] and corpus.report.trained_share == 1


def test_split_rows_join_to_the_documents(documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer, eval_rows=0)
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    assert corpus.report.dropped == {}
    assert "".join(byte_tokenizer.decode(ids[1:]) for ids in corpus.train["input_ids"]) == "".join(
        f"{t}</s>" for t in texts
    )


def test_documents_are_trained_on_or_held_out(documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer)
    held = set().union(*(sources(byte_tokenizer, row["input_ids"]) for row in corpus.evaluation))
    seen = set().union(*(sources(byte_tokenizer, ids) for ids in corpus.train["input_ids"]))
    assert len(corpus.evaluation) == 6 and held and seen and held.isdisjoint(seen) and len(held | seen) == 30


def test_joined_rows_are_full_and_documents_keep_their_bos(documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer, join_documents=True, eval_rows=0)
    *full, last = corpus.train["input_ids"]
    assert all(len(ids) == 64 and ids[0] == BOS for ids in full) and len(last) <= 64
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    joined = "".join(byte_tokenizer.decode(ids[1:] if ids[0] == BOS else ids) for ids in [*full, last])
    assert joined.replace("<s>", "") == "".join(f"{text}</s>" for text in texts)
    assert any(ids.count(BOS) > 1 for ids in full)


def test_joined_evaluation_rows_share_no_document_with_training(documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer, join_documents=True, eval_rows=3)
    held = set().union(*(sources(byte_tokenizer, row["input_ids"]) for row in corpus.evaluation))
    seen = set().union(*(sources(byte_tokenizer, ids) for ids in corpus.train["input_ids"]))
    assert 1 <= len(corpus.evaluation) <= 3 and held.isdisjoint(seen)


def test_without_bos_documents_are_told_apart_by_eos(documents, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.bos_token = None
    split = load(documents, tokenizer, eval_rows=0, end_of_document=False)
    assert all(BOS not in ids and EOS not in ids for ids in split.train["input_ids"])
    for end in (True, False):
        joined = load(documents, tokenizer, eval_rows=0, join_documents=True, end_of_document=end)
        assert sum(ids.count(EOS) for ids in joined.train["input_ids"]) == 30
    tokenizer.eos_token = None
    with pytest.raises(data.DataError, match=r"data.join_documents needs"):
        load(documents, tokenizer, eval_rows=0, join_documents=True)


def test_one_long_text_holds_its_end_out(tmp_path, byte_tokenizer):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff".encode() + "".join(f"line {n}\r\n" for n in range(400)).encode())
    corpus = load(path, byte_tokenizer, eval_rows=5)
    trained, held = (
        "".join(byte_tokenizer.decode(ids[1:]) for ids in rows)
        for rows in (corpus.train["input_ids"], [row["input_ids"] for row in corpus.evaluation])
    )
    assert len(corpus.evaluation) == 5 and "the last rows are held out" in corpus.report.notes[0]
    assert trained + held == "\n".join(f"line {n}" for n in range(400)) + "</s>"
    assert len(load(path, byte_tokenizer, eval_rows=10_000).evaluation) <= len(corpus.train) + 5


def test_what_is_left_out_is_counted(tmp_path, byte_tokenizer):
    path = tmp_path / "texts.json"
    texts = ["one two three", "", " \n", "one two three", "ONE\ttwo\r\nthree", "x", "four five six"]
    path.write_text(json.dumps([{"body": text} for text in texts]))
    corpus = load(path, byte_tokenizer, columns={"text": "body"}, eval_rows=0, end_of_document=False)
    assert len(corpus.train) == 2
    assert corpus.report.dropped == {EMPTY: 2, DUPLICATE: 1, REWRITTEN: 1, TOO_SHORT: 1}
    path.write_text(json.dumps([{"body": "one"}, {"body": None}]))
    with pytest.raises(data.DataError, match=r"record 1 holds no text in column 'body'"):
        load(path, byte_tokenizer, columns={"text": "body"})


def test_evaluation_documents_of_their_own_file_are_not_trained_on(documents, tmp_path, byte_tokenizer):
    other = tmp_path / "eval.jsonl"
    other.write_text("\n".join(documents.read_text().splitlines()[:4]))
    corpus = load(documents, byte_tokenizer, eval_path=str(other), eval_rows=3)
    assert len(corpus.evaluation) == 3 and corpus.report.dropped == {EVALUATED: 4}


def test_nothing_to_evaluate_on_is_an_error(tmp_path, byte_tokenizer):
    (tmp_path / "one.txt").write_text("one two three")
    with pytest.raises(data.DataError, match=r"no row to evaluate on: give data.eval_path, or set data.eval_rows: 0"):
        load(tmp_path / "one.txt", byte_tokenizer)
    assert len(load(tmp_path / "one.txt", byte_tokenizer, eval_rows=0).train) == 1


@pytest.mark.parametrize("joined", [False, True])
def test_the_end_of_every_document_is_trained(joined, documents, byte_tokenizer):
    corpus = load(documents, byte_tokenizer, eval_rows=0, join_documents=joined)
    assert sum(labels.count(EOS) for labels in corpus.train["labels"]) == 30
    assert "the end of every document is trained, as </s>" in corpus.report.notes
    without = load(documents, byte_tokenizer, eval_rows=0, join_documents=joined, end_of_document=False)
    assert not any(EOS in labels for labels in without.train["labels"])
    assert any("data.end_of_document: false" in note for note in without.report.notes)


def test_documents_in_another_writing_are_not_trained_on_and_held_out(documents, tmp_path, byte_tokenizer):
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    documents.write_text(
        "\n".join(json.dumps({"text": form}) for t in texts for form in (t, t.upper().replace(" ", "  ")))
    )
    corpus = load(documents, byte_tokenizer)
    assert corpus.report.dropped[REWRITTEN] == 30
    other = tmp_path / "held.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"\t{t.title()}"}) for t in texts[:4]))
    assert load(documents, byte_tokenizer, eval_path=str(other)).report.dropped[EVALUATED] == 4


def test_control_tokens_in_documents_are_letters(tmp_path, byte_tokenizer):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": "one </s> two <s> three"}, {"text": "four five six"}]))
    corpus = load(path, byte_tokenizer, eval_rows=0)
    assert [(ids.count(BOS), ids.count(EOS)) for ids in corpus.train["input_ids"]] == [(1, 1)] * 2
    assert byte_tokenizer.decode(corpus.train["input_ids"][0]) == "<s>one </s> two <s> three</s>"
    assert "control tokens that are written in the data (1 x </s>, 1 x <s>)" in corpus.report.notes[-1]
