"""A directory: its data files are read and nothing else, and what cannot be told apart is refused."""

import json

import pandas
import pytest

from data import DataError
from data.sources.records import read_records

RECORDS = [{"text": f"document {number}"} for number in range(20)]


def write(folder, **files):
    """Files by name, in which two underlines are a slash and one is the dot before the ending."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pandas.DataFrame(content).to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(content)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_files_are_read_and_the_prose_beside_them_is_not(kind, tmp_path):
    prose = {
        "README_md": "# Card",
        "LICENSE_txt": "terms\n" * 40,
        "docs__CHANGELOG_md": "new",
        "dataset_info_json": "{}",
    }
    write(tmp_path, **{f"docs_{kind}": RECORDS}, **prose)
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden", copy_jsonl=RECORDS)
    notes = []
    assert read_records(str(tmp_path), notes=notes) == RECORDS
    [note] = notes
    assert f"read 1 of the files in {tmp_path}: docs.{kind}; ignored: LICENSE.txt, README.md" in note


def test_texts_in_sub_folders_are_whole_documents(tmp_path):
    write(tmp_path, **{f"author{n}__book_txt": f"book {n}\nsecond line" for n in range(4)}, README_md="a card")
    assert [record["text"] for record in read_records(str(tmp_path))] == [f"book {n}\nsecond line" for n in range(4)]
    (tmp_path / "author0/test").mkdir()  # the name of a split somewhere below is only a name
    write(tmp_path / "author0/test", more_txt="more")
    assert len(read_records(str(tmp_path))) == 5
    with pytest.raises(DataError, match="has no split 'test'; its splits are train"):
        read_records(str(tmp_path), split="test")


def test_files_outside_of_every_split_are_named(tmp_path):
    write(tmp_path, train_jsonl=RECORDS[:8], test_jsonl=RECORDS[8:10], more_jsonl=RECORDS[10:])
    notes = []
    assert read_records(str(tmp_path), notes=notes) == RECORDS[:8]
    assert notes == [f"read 1 of the files in {tmp_path}: train.jsonl; ignored: more.jsonl"]


def test_sub_folders_that_are_all_splits_are_splits(tmp_path):
    write(tmp_path, train__a_txt="a", train__more__b_txt="b", validation__c_txt="c")
    assert [record["text"] for record in read_records(str(tmp_path))] == ["a", "b"]
    assert [record["text"] for record in read_records(str(tmp_path), split="validation")] == ["c"]


@pytest.mark.parametrize(
    "files, parts",
    [
        ({"docs_jsonl": RECORDS, "novel_txt": "a novel"}, ["several kinds", "json: docs.jsonl", "text: novel.txt"]),
        ({"docs_jsonl": RECORDS, "more_parquet": RECORDS}, ["json: docs.jsonl", "parquet: more.parquet"]),
        ({"README_md": "a card"}, ["nothing but README.md", "name the file itself with data.path"]),
        ({}, ["no file"]),
    ],
)
def test_what_is_not_clear_is_refused(files, parts, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        read_records(str(tmp_path))
    for part in (str(tmp_path), *parts):
        assert part in str(caught.value)


def test_shards_are_read_in_order(tmp_path):
    shards = {f"data__train-0000{n}-of-00003_parquet": RECORDS[n * 5 : n * 5 + 5] for n in range(3)}
    write(tmp_path, **shards, **{"data__test-00000-of-00001_parquet": RECORDS[15:]})
    assert read_records(str(tmp_path)) == RECORDS[:15]
    assert read_records(str(tmp_path), split="test") == RECORDS[15:]
