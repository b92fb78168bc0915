"""A finished run where its base model has moved, and its adapter where only the Hub has it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import AutoTokenizer

import lrsa
from lrsa.evaluation import Results
from lrsa.evaluation.measure import state
from tests.train.publish.hub_server import TOKEN

ROOT = Path(__file__).resolve().parents[3]


def script(monkeypatch, name: str, *arguments: object) -> int:
    """A script of launch/ in this process; returns the exit status."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module.main()


@pytest.fixture
def moved(tiny_run, tiny_copy, tmp_path) -> Path:
    """The base model of `tiny_copy`, which says in all its files that it lies where nothing is."""
    base = shutil.copytree(tiny_run.parents[1] / "base", tmp_path / "moved")
    for name in ("config.yaml", "adapter_config.json"):
        text = (tiny_copy / name).read_text()
        (tiny_copy / name).write_text(text.replace(str(tiny_run.parents[1] / "base"), "/gone/away"))
        assert "/gone/away" in (tiny_copy / name).read_text()
    return base


def test_evaluation_of_a_run_whose_base_moved(moved, tiny_run, tiny_copy, monkeypatch, capsys):
    assert script(monkeypatch, "evaluate", "--run", tiny_copy) == 2
    assert "model.name_or_path: no such model directory: /gone/away" in capsys.readouterr().err
    assert script(monkeypatch, "evaluate", "--run", tiny_copy, "--set", f"model.name_or_path={moved}") == 0
    found, expected = (Results.load(run).cells["LRSA-LoRA"] for run in (tiny_copy, tiny_run))
    assert {name: cell.scores for name, cell in found.items()} == {name: cell.scores for name, cell in expected.items()}


def test_evaluation_attends_as_model_attention_says(tiny_copy, monkeypatch):
    impls, apply = [], state.apply_lrsa
    monkeypatch.setattr(state, "apply_lrsa", lambda *args: impls.append(args[2]) or apply(*args))
    assert script(monkeypatch, "evaluate", "--run", tiny_copy, "--set", "model.attention=reference") == 0
    assert len(impls) > 4 and set(impls) == {"reference"}


def test_publishing_a_run_whose_base_moved(moved, tiny_copy, monkeypatch, hub, capsys):
    options = ["--run", tiny_copy, "--repo-id", "user/tiny", "--dry-run"]
    assert script(monkeypatch, "publish", *options) == 2
    assert "/gone/away" in capsys.readouterr().err
    assert script(monkeypatch, "publish", *options, "--base-model", "org/base") == 0
    published = json.loads((tiny_copy / "hub" / "adapter_config.json").read_text())
    assert published["base_model_name_or_path"] == "org/base"


def test_an_adapter_that_only_the_hub_has(tiny_run, tiny_copy, tmp_path, monkeypatch, hub):
    """With its named chat templates, which lie in a sub-folder, and nothing that is code."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tiny_copy)
    assert script(monkeypatch, "publish", "--run", tiny_copy, "--repo-id", "user/tiny", "--base-model", "org/base") == 0
    HfApi(endpoint=hub.url, token=TOKEN).upload_file(
        path_or_fileobj=b"", path_in_repo="adapter_model.bin", repo_id="user/tiny"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    found = lrsa.load("user/tiny").tokenizer
    assert found.chat_template == tokenizer.chat_template
    assert not list((tmp_path / "cache").rglob("*.py")) and not list((tmp_path / "cache").rglob("*.bin"))
    config = tiny_run.parents[1] / "tiny.yaml"
    assert script(monkeypatch, "evaluate", "--adapter", "user/tiny", "--config", config, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "results.json").is_file()
