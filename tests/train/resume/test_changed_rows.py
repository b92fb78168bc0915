"""A run goes on with the rows that it began with, or not at all."""

import json

import pytest

from tests.tiny_run import SETTINGS, launch_here, make_workplace

OPTIONS = ("data.eval_path=null", "data.eval_rows=3", "eval.control=false", "train.max_steps=4", "train.output_dir=run")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer):
    """A finished run that holds three of its sixteen documents out."""
    place = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)
    assert train(place).returncode == 0
    return place


def train(place, *options):
    return launch_here(place, "launch/train.py", "--config", "run.yaml", *options, "--set", *OPTIONS)


def state(place):
    return {path.name: path.read_bytes() for path in (place / "run").iterdir() if path.is_file()}


def test_changed_documents_are_not_gone_on_with(workplace):
    path, before = workplace / "text.jsonl", state(workplace)
    original = path.read_text()
    rows = [json.loads(line) for line in original.splitlines()]
    for changed in (rows[1:], [*rows[4:], *rows[:4]], [*rows, {"text": "one more document of six"}]):
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        done = train(workplace, "--resume")
        assert done.returncode == 2 and state(workplace) == before
        for part in ("data: the rows to train on", "are not those of the run in run (", "--overwrite"):
            assert part in done.stderr, done.stderr
    path.write_text(original)
    done = train(workplace, "--resume")
    assert done.returncode == 0, done.stderr


def test_a_changed_tokenizer_is_not_gone_on_with(workplace):
    path = workplace / "model" / "tokenizer_config.json"
    original = path.read_text()
    values = json.loads(original)
    path.write_text(json.dumps(values | {"eos_token": values["bos_token"]}))
    done = train(workplace, "--resume")
    path.write_text(original)
    assert done.returncode == 2 and "tokenizer or chat template have changed" in done.stderr


def test_evaluation_of_other_rows_is_told(workplace):
    path = workplace / "text.jsonl"
    original = path.read_text()
    command = ("launch/evaluate.py", "--run", "run", "--out", "elsewhere", "--keep-ratios", "0.5")
    done = launch_here(workplace, *command)
    assert done.returncode == 0 and "warning" not in done.stderr
    path.write_text("".join(original.splitlines(keepends=True)[4:]))
    done = launch_here(workplace, *command)
    path.write_text(original)
    assert done.returncode == 0 and "some rows may have been trained on" in " ".join(done.stderr.split())
