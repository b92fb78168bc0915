"""The real command on chats: trained, evaluated, and what the run's prompt format and card then say."""

import copy
import json
import sys

import pytest
from transformers import AutoTokenizer

from launch.command_line import explain
from lrsa import PromptFormat
from tests.data.chat.test_rows import CHATML, chat, with_template
from tests.tiny_run import ROOT, SETTINGS, launch, log_of, make_workplace
from train.run import run
from train.settings.load import load_settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer):
    settings = copy.deepcopy(SETTINGS)
    settings["data"] = {"kind": "chat", "path": "chats-*.jsonl", "context_length": 128, "eval_rows": 4}
    settings["train"] |= {"output_dir": "runs/first", "max_steps": 4, "logging_steps": 1, "report_to": "none"}
    settings["eval"] = {"keep_ratios": [0.5]}
    place = make_workplace(tmp_path_factory.mktemp("work"), with_template(byte_tokenizer, CHATML), settings)
    records = [chat(f"river {n} {'fox ' * (n % 7)}who?", "Anna " * (n % 3 + 1), "and?", "a dog") for n in range(24)]
    for part in (0, 1):
        lines = [json.dumps(record) + "\n" for record in records[part::2]]
        (place / f"chats-{part}.jsonl").write_text("".join(lines))
    return place


def test_a_run_on_chats(workplace):
    done = launch(workplace, sys.executable, str(ROOT / "launch" / "train.py"), "--config", "run.yaml")
    assert done.returncode == 0, done.stderr
    directory = workplace / "runs" / "first"
    first = log_of(directory)[0]
    assert first["selection"] > 0, "chats teach the selection"
    report = json.loads((directory / "data_report.json").read_text())
    assert (report["rows"], report["evaluation_rows"], report["kind"]) == (20, 4, "chat")
    assert [trained for _, trained in report["sample"]] == [False, True, False, True]
    turn = PromptFormat.of(AutoTokenizer.from_pretrained(workplace / "model"))
    assert PromptFormat.from_pretrained(directory) == turn
    assert "Who found the river?" in (directory / "README.md").read_text()
    results = json.loads((directory / "results.json").read_text())
    assert results["n"] == 4 and results["rows"]["compressed_share"] == 1


def run_here(workplace, *overrides, **options) -> int:
    """The same in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return explain(lambda: run(load_settings("run.yaml", list(overrides)), **options))


def test_a_chat_that_is_none_is_named_with_its_record(workplace, capsys):
    (workplace / "bad.jsonl").write_text('{"messages": [{"role": "boss", "content": "x"}]}\n')
    assert run_here(workplace, "data.path=bad.jsonl", "train.output_dir=runs/bad") == 2
    assert "record 0: message 0: unknown role 'boss'; allowed are" in capsys.readouterr().err
