"""Any file tree, encoding, control token, chat template and tokenizer: what is meant is read, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

import data
from data.settings import DataSettings
from data.sources.records import read_records
from lrsa import PromptFormat

common = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Question: who?\nAnswer: Anna.", "3 4 8 2 ist groß 北京"] * 3
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def byte_level(**special) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = list(dict.fromkeys(special.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=names, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def sentence_piece() -> PreTrainedTokenizerFast:
    """A blank in front of every text, and bytes for what has no token."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3]))
    raw.add_tokens(special[3:])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Lower case without accents; the first and the last token of a text are added by the tokenizer itself."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    raw.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def added_tokens() -> PreTrainedTokenizerFast:
    """Control tokens of chats, one that takes the blanks around it, and an added word that is no control token."""
    tokenizer = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    greedy = AddedToken("<|sep|>", lstrip=True, rstrip=True, special=True, normalized=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", greedy]})
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


KINDS = {
    "sentencepiece": sentence_piece,
    "byte-level": lambda: byte_level(bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    "wordpiece": word_piece,
    "added": added_tokens,
    "no bos": lambda: byte_level(eos_token="</s>"),
    "no eos": lambda: byte_level(bos_token="<s>", pad_token="<pad>"),
}
words = [
    "river",
    "fox",
    "ß",
    "北京",
    "\n\n",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|sep|>",
    "<tool>",
    "[SEP]",
    "<unk>",
    "<0x41>",
]
texts = st.lists(st.sampled_from(words), min_size=6, max_size=20).map(" ".join)


def is_message(error: Exception) -> bool:
    """A text for the person who brought the data, not for a programmer."""
    return bool(str(error).strip()) and not re.search(r"[A-Z]\w+(Error|Exception)\b|Traceback|<class ", str(error))


def controls(tokenizer, ids) -> int:
    """Control tokens among ids; an unknown character is none."""
    found = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return sum(number in found for number in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_those_of_the_format(kind, tmp_path):
    """Whatever stands in documents, passages and answers, under any template of TRL: nothing else begins or ends a
    turn, and every row ends with what ends an answer."""
    plain, made = KINDS[kind](), []

    @settings(max_examples=25, **common)
    @given(st.lists(texts, min_size=4, max_size=6, unique=True), st.sampled_from([None, None, *TEMPLATES]))
    def check(documents, template):
        plain.chat_template = None if template is None else template.read_text(encoding="utf-8")
        records = [
            {"question": f"who {text[:9]}?", "context": text, "answers": [text.split()[0]]} for text in documents
        ]
        (tmp_path / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        try:
            options = {"kind": "qa", "path": str(tmp_path / "qa.jsonl"), "context_length": 2000, "eval_rows": 0}
            corpus = data.load(DataSettings(**options), plain, 0, 20)
        except data.DataError as error:
            assert is_message(error)
            return
        form = PromptFormat.of(plain)
        expected = plain(form.prompt("a") + form.lead + "b" + form.after, add_special_tokens=False)["input_ids"]
        for row in corpus.train:
            assert controls(plain, row["input_ids"]) == controls(plain, expected)
            assert form.end is None or row["labels"][-1] == form.end == row["input_ids"][-1]
        made.append(template)

    check()
    assert len(made) >= 2, "rows were made"


def test_a_file_in_any_encoding_is_read_as_it_is_meant_or_refused(tmp_path):
    read = []

    @settings(max_examples=100, **common)
    @given(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=40),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "gbk", "shift-jis"]),
        st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]),
        st.sampled_from(["\n", "\r\n"]),
    )
    def check(text, encoding, ending, newline):
        field = text.replace('"', '""')
        content = {
            "txt": text, "jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
            "json": json.dumps([{"text": text}], ensure_ascii=False), "csv": f'text,n\n"{field}",1\n',
            "tsv": f'text\tn\n"{field}"\t1\n',
        }[ending]  # fmt: skip
        file = tmp_path / f"any.{ending}"
        try:
            file.write_bytes(content.replace("\n", newline).encode(encoding))
        except UnicodeEncodeError:
            return
        try:
            [record] = read_records(str(file))
        except data.DataError as error:
            assert str(file) in str(error) and is_message(error)
            return
        assert record["text"] == text
        read.append(ending)

    check()
    assert set(read) == {"txt", "jsonl", "json", "csv", "tsv"}


PROSE = ["README.md", "LICENSE", "sub/LICENSE.txt", "CITATION.md", "requirements.txt"]
HIDDEN = [".git/a.jsonl", "sub/.cache/b.txt", ".DS_Store", "dataset_info.json"]
TREES = [
    "a.jsonl",
    "b.jsonl",
    "sub/c.jsonl",
    "train.jsonl",
    "test.jsonl",
    "data/train-0.jsonl",
    "a.csv",
    "b.tsv",
    "a.txt",
]
TREES += ["train/a.txt", "test/b.txt", "sub/deep/book.md", "list.json", "photo.png", "notes.docx"]


def test_of_any_tree_only_data_is_read(tmp_path_factory):
    """Every record says which file it is from: none is from prose or hidden files, and what is left aside is named."""
    seen = []

    @settings(max_examples=40, **common)
    @example({"README.md", "photo.png", "sub/LICENSE.txt"})
    @given(st.sets(st.sampled_from([*PROSE, *HIDDEN, *TREES]), min_size=1, max_size=5))
    def check(names):
        folder, notes = tmp_path_factory.mktemp("tree"), []
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = {".jsonl": json.dumps({"text": name}), ".json": json.dumps([{"text": name}])}
            content |= {".csv": f"text,n\n{name},1\n", ".tsv": f"text\tn\n{name}\t1\n"}
            (folder / name).write_text(content.get(Path(name).suffix, name))
        try:
            found = {record.get("text") for record in read_records(str(folder), notes=notes)}
        except data.DataError as error:
            assert str(folder) in str(error) and is_message(error)
            return
        if found == {None}:  # pictures, which are a data set for others
            return
        assert found <= names & {*TREES}, "from data files alone"
        others = {name for name in names - found if not any(part.startswith(".") for part in Path(name).parts)}
        splits = {name for name in others if Path(name).parts[0] == "test" or Path(name).stem == "test"}
        listed = notes[0].partition("; ignored: ")[2]
        assert all(name in listed for name in others - splits), notes
        seen.append(len(found))

    check()
    assert max(seen) > 1
