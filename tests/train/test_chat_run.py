"""Runs on chats, on several sources and on streamed rows: trained, evaluated, resumed, and what the card then says."""

import copy
import json
import re
import shutil
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data import mixture
from lrsa import PromptFormat
from tests.data.chat.test_rows import CHATML, chat, with_template
from tests.tiny_run import SETTINGS, log_of, make_workplace, run_here
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
    assert run_here(workplace) == 0
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
    assert results["n"] == 4 and results["rows"]["compressed_share"] == 1 and len(results["expected"]) == 4
    cells = {(cell["model"], cell["setting"]): cell["scores"] for cell in results["cells"]}
    assert cells.keys() == {(model, cache) for model in ("base", "LRSA-LoRA") for cache in ("full", "1/2", "1/4")}
    assert all([*scores] == ["loss", "token_accuracy", "f1", "exact_match"] for scores in cells.values())
    assert cells["LRSA-LoRA", "full"]["loss"]["value"] < cells["base", "full"]["loss"]["value"]


def test_a_chat_that_is_none_is_named_with_its_record(workplace, capsys):
    (workplace / "bad.jsonl").write_text('{"messages": [{"role": "boss", "content": "x"}]}\n')
    assert run_here(workplace, "data.path=bad.jsonl", "train.output_dir=runs/bad") == 2
    assert "record 0: message 0: unknown role 'boss'; allowed are" in capsys.readouterr().err


SOURCES = [
    {"kind": "chat", "path": "chats-*.jsonl", "eval_rows": 3, "weight": 2},
    {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "weight": 1},
    {"kind": "synthetic", "eval_rows": 2, "weight": 1, "synthetic": {"keys": 2, "digits": 2, "rows": 12}},
]


def test_a_run_on_several_sources(workplace):
    config = json.loads((workplace / "run.yaml").read_text())
    config["data"] = {"sources": SOURCES, "context_length": 128}
    (workplace / "mixed.yaml").write_text(json.dumps(config))
    assert run_here(workplace, "train.output_dir=runs/mixed", config="mixed.yaml") == 0
    directory = workplace / "runs" / "mixed"
    places = [directory, directory / "evaluation" / "text.jsonl", directory / "evaluation" / "synthetic_key_value"]
    found = [json.loads((place / "results.json").read_text()) for place in places]
    assert [(results["task"], results["n"]) for results in found] == [("chat", 3), ("loss", 4), ("retrieval", 2)]
    report = json.loads((directory / "data_report.json").read_text())
    assert [line.split(",")[0] for line in report["sources"]] == [
        "chats-*.jsonl: chat", "text.jsonl: text", "synthetic key_value: synthetic",
    ]  # fmt: skip
    assert (
        "local data chats-*.jsonl, chat; local data text.jsonl, text; generated"
        in (directory / "README.md").read_text()
    )
    card = (directory / "README.md").read_text()
    titles = [line for line in card.splitlines() if line.startswith("### ")]
    assert titles == ["### chats-*.jsonl", "### text.jsonl", "### synthetic key_value"]
    assert all((directory / unquote(picture)).is_file() for picture in re.findall(r"\]\((\S+?\.png)\)", card))
    stored = load_settings(str(directory / "config.yaml")).data
    assert stored.sources[1].path == str(workplace / "text.jsonl") and stored.sources[0].weight == 2


@pytest.mark.slow
def test_a_run_is_resumed_after_a_source_has_moved(workplace, capsys):
    config = json.loads((workplace / "run.yaml").read_text())
    config["data"] = {"sources": SOURCES, "context_length": 128}
    (workplace / "mixed.yaml").write_text(json.dumps(config | {"eval": {"enabled": False}}))
    options = ["train.output_dir=runs/moved", "train.max_steps=2"]
    assert run_here(workplace, *options, config="mixed.yaml") == 0
    (workplace / "runs" / "moved" / "adapter_model.safetensors").unlink()
    stored = workplace / "runs" / "moved" / "config.yaml"
    stored.write_text(stored.read_text().replace("path: ../../text.jsonl", "path: /gone/text.jsonl"))
    assert run_here(workplace, *options, config="mixed.yaml", resume=True) == 2
    told = capsys.readouterr().err
    assert "data.sources.1.path: was '/gone/text.jsonl'" in told and "data.sources.0.path=..." in told
    assert "sources.0.path: was" not in told
    assert run_here(workplace, *options, "data.sources.1.path=text.jsonl", config="mixed.yaml", resume=True) == 0
    assert "path: ../../text.jsonl" in stored.read_text()


def test_a_streamed_run_resumes_at_the_row(workplace, monkeypatch):
    monkeypatch.setattr(mixture, "BLOCK", 8)
    config = json.loads((workplace / "run.yaml").read_text())
    config["data"] = {
        "sources": SOURCES,
        "context_length": 128,
        "streaming": True,
        "stopping_strategy": "all_exhausted",
    }
    config["eval"] = {"enabled": False}
    (workplace / "stream.yaml").write_text(json.dumps(config))
    runs = workplace / "runs"
    assert run_here(workplace, "train.max_steps=6", "train.output_dir=runs/whole", config="stream.yaml") == 0
    shutil.copytree(runs / "whole", runs / "again")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (runs / "again" / name).unlink()
    shutil.rmtree(runs / "again" / "checkpoint-6")
    overrides = ["train.max_steps=6", "train.output_dir=runs/again"]
    assert run_here(workplace, *overrides, config="stream.yaml", resume=True) == 0
    whole, again = (load_file(runs / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["step"] for line in log_of(runs / "again")] == [1, 2, 3, 4, 5, 6]


def test_streaming_needs_a_number_of_steps(workplace, capsys):
    assert run_here(workplace, "data.streaming=true", "train.max_steps=-1", "train.output_dir=runs/none") == 2
    assert "train.max_steps must be set with data.streaming" in capsys.readouterr().err
