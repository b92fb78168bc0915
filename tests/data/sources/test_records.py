import csv
import json

import datasets
import huggingface_hub
import pyarrow
import pytest

from data import DataError, DataSettings
from data.sources.records import iterate_records, read_evaluation_records, read_records

RECORDS = [{"text": "one"}, {"text": "two\u2028still two"}]


def test_json_layouts_give_the_same_records(tmp_path):
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    contents = {
        "list.json": json.dumps(RECORDS),
        "data.json": json.dumps({"version": "1.1", "data": RECORDS}),
        "lines.json": lines,
        "lines.jsonl": lines + "\n\n",
        "bom.jsonl": "\ufeff" + lines.replace("\n", "\r\n"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode())
        assert read_records(str(tmp_path / name)) == RECORDS, name


def packed(file, ending):
    with pyarrow.output_stream(str(file) + ending, compression="detect") as stream:
        stream.write(file.read_bytes())
    return f"{file}{ending}"


def test_every_format_gives_the_same_records_directly_and_packed(tmp_path):
    table = datasets.Dataset.from_list(RECORDS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", force_ascii=False)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    arrow = table.data.table
    for name, new in {"stream.arrow": pyarrow.ipc.new_stream, "file.arrow": pyarrow.ipc.new_file}.items():
        with new(tmp_path / name, arrow.schema) as writer:
            writer.write_table(arrow)
    files = sorted(tmp_path.iterdir())
    texts = [file for file in files if file.suffix in (".jsonl", ".json", ".csv", ".tsv")]
    assert len(files) == 7 and len(texts) == 4
    every = [*map(str, files), *(packed(file, end) for file in texts for end in (".gz", ".zst", ".bz2"))]
    for path in every:
        assert read_records(path) == RECORDS, path
    assert read_records(every) == RECORDS * len(every), "a list"
    assert read_records(str(tmp_path / "a.json*.zst")) == RECORDS * 2, "a pattern"


def test_a_pattern_without_files_and_one_with_several_kinds_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0]))
    (tmp_path / "LICENSE.txt").write_text("terms")
    with pytest.raises(DataError, match=r"data\.path .*/\*\.json: no file has a name like that"):
        read_records(str(tmp_path / "*.json"))
    with pytest.raises(DataError, match=r"several kinds \(LICENSE\.txt, a\.jsonl\): write the ending"):
        read_records(str(tmp_path / "*"))
    with pytest.raises(DataError, match=r"b\.jsonl: no such file"):
        read_records([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])


def test_records_are_read_as_they_are_needed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nnot json\n')
    records = iterate_records(str(tmp_path / "a.jsonl"))
    assert [next(records)["text"], next(records)["text"]] == ["one", "two"]
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON"):
        next(records)


def test_a_text_file_is_one_document_without_bom_and_carriage_returns(tmp_path):
    (tmp_path / "book.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert read_records(str(tmp_path / "book.txt")) == [{"text": "one\ntwo\n"}]


def test_a_directory_of_texts_has_one_document_per_file(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(f"{name}\nsecond line")
    assert [record["text"][:4] for record in read_records(str(tmp_path))] == ["a.md", "b.tx"]


def test_splits_of_a_directory_are_told_apart_by_names(tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"set/{split}.jsonl").write_text(json.dumps({"text": split}))
    assert read_records(str(tmp_path / "set"), split="validation") == [{"text": "validation"}]
    with pytest.raises(DataError, match=r"has no split 'test'; its splits are train, validation"):
        read_records(str(tmp_path / "set"), split="test")


@pytest.mark.parametrize("path", ["missing.json", "./missing", "~/missing/set"])
def test_a_missing_file_says_where_it_was_looked_for(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file; looked for /") as caught:
        read_records(path)
    assert "missing" in str(caught.value)


def test_a_name_that_is_neither_file_nor_reachable_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        read_records("someone/questions", "hard")
    for part in ("someone/questions (name hard, split train)", str(tmp_path / "someone"), "datasets.load_dataset says"):
        assert part in str(caught.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.json", "", "no record"),
        ("a.json", "[]", "no record"),
        ("a.jsonl", "\n", "no record"),
        ("a.json", '{"rows": [1]}', "must hold a list"),
        ("a.json", '[{"text": "one"}, 2]', "must be JSON objects, record 1 is int"),
        ("a.json", '[{"text": "one"},\n{"text" "two"}]', "a.json:2: not valid JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ("a.xlsx", "text", "unknown kind of file"),
        ("a.csv", "text,label\none,1\ntwo,2,3\n", "a.csv:3: 3 fields, but the first line names 2 columns"),
        ("a.csv", 'text\n"one\n', "a.csv:2: not valid CSV"),
        ("a.parquet", "text", "cannot be read as Parquet"),
        ("a.arrow", "text", "cannot be read as Arrow"),
        ("a.jsonl.gz", "text", r"cannot be read as \.jsonl\.gz"),
        ("a.parquet.gz", "text", "unknown kind of file; allowed are"),
        ("a.jsonl", '{"text": "one"}\n{"text": "a \\ud83d b"}', r"record 1, field text: 'a \\ud83d b' holds half of a"),
        *(
            (f"a.{kind}", LFS, "Git LFS pointer, not the data: run git lfs pull")
            for kind in ("txt", "jsonl", "parquet")
        ),
        ("a.json", '[{"answers": {"text": ["\\uDC00"]}}]', "record 0, field answers.text.0"),
    ],
)
def test_unusable_files_say_why(name, content, part, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=part):
        read_records(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_utf16_without_a_mark_is_not_read_as_utf8(name, tmp_path):
    """Every second character would be a NUL."""
    (tmp_path / name).write_text("text\nnine\n", encoding="utf-16-le")
    with pytest.raises(DataError, match="holds NUL characters, as UTF-16 does"):
        read_records(str(tmp_path / name))


def test_a_file_that_is_not_utf8_says_so(tmp_path):
    (tmp_path / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(str(tmp_path / "a.txt"))


def test_evaluation_records_have_a_source_of_their_own_or_none(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(RECORDS))
    settings = DataSettings(kind="text", path="train.json", eval_path=str(path))
    assert read_evaluation_records(settings) == RECORDS
    assert read_evaluation_records(settings.model_copy(update={"eval_rows": 0})) is None
    assert read_evaluation_records(DataSettings(kind="text", path=str(path))) is None
    with pytest.raises(DataError, match=r"data\.eval_path missing\.json: no such file"):
        read_evaluation_records(DataSettings(kind="text", path=str(path), eval_path="missing.json"))
    with pytest.raises(DataError, match="has no splits"):
        read_evaluation_records(DataSettings(kind="text", path=str(path), eval_split="test"))


def test_files_have_neither_subsets_nor_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    for path in ("a.jsonl", "*.jsonl", "saved", ".", ["a.jsonl", "saved"]):
        where = [str(tmp_path / one) for one in path] if isinstance(path, list) else str(tmp_path / path)
        with pytest.raises(DataError, match=r"data.name en: data.path .* has none: leave it out"):
            read_records(where, name="en")
        with pytest.raises(DataError, match=r"split dev: .*leave" if path != "." else "holds files of several"):
            read_records(where, split="dev")
    settings = {"kind": "text", "path": str(tmp_path / "saved"), "split": "train"}
    path = str(tmp_path / "a.jsonl")
    assert read_evaluation_records(DataSettings(**settings | {"split": "dev"}, eval_path=path)) == [{"text": "a"}]
    with pytest.raises(DataError, match="split dev"):
        read_evaluation_records(DataSettings(**settings, eval_path=path, eval_split="dev"))


def test_every_entry_of_a_list_has_the_split_that_it_can_have(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    one = datasets.Dataset.from_list([{"text": "one"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "dev": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "splits")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "one", "splits")]
    expected = [{"text": "a"}, {"text": "one"}, *RECORDS]
    assert read_records(paths, split="dev") == expected
    settings = {"kind": "text", "path": "user/set", "split": "dev"}
    assert read_evaluation_records(DataSettings(**settings, eval_path=paths)) == expected
    assert read_evaluation_records(DataSettings(**settings, eval_path=paths[1])) == [{"text": "one"}]
    assert (
        read_evaluation_records(DataSettings(**settings | {"split": "x"}, eval_path=paths, eval_split="dev"))
        == expected
    )


def test_values_of_a_csv_file_are_the_texts_that_stand_there(tmp_path):
    values = ["None", "NA", "null", "nan", "007", "3.10", "", 'two\nlines, and "quotes"']
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["question", "answers"], *([f"q{n}", value] for n, value in enumerate(values))])
    expected = [{"question": f"q{n}", "answers": value} for n, value in enumerate(values)]
    assert read_records(str(tmp_path / "a.csv")) == expected
    (tmp_path / "a.tsv").write_text("question\tanswers\nq\t" + "long " * 40_000)
    assert read_records(str(tmp_path / "a.tsv")) == [{"question": "q", "answers": "long " * 40_000}]


def test_csv_files_that_datasets_reads_keep_words_that_look_like_no_value(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: one.csv\n---\n")
    (tmp_path / "set/one.csv").write_text("question,answers\nq,None\nq,\n")
    assert [record["answers"] for record in read_records(str(tmp_path / "set"), "a")] == ["None", None]


def test_parquet_and_saved_data_sets(tmp_path):
    table = datasets.Dataset.from_list(RECORDS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert read_records(str(tmp_path / "a.parquet")) == RECORDS
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert read_records(str(tmp_path / "saved"), split="test") == RECORDS[1:]
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, test"):
        read_records(str(tmp_path / "saved"), split="dev")
