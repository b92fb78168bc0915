"""A merged model is its adapter: the same logits under LRSA, the same prompt, loaded in one line without peft."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import lrsa
from launch import merge as script
from train.merge import merge


def run_script(monkeypatch, capsys, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["launch/merge.py", *options])
    monkeypatch.setattr(sys, "path", list(sys.path))
    status = script.main()
    out, err = capsys.readouterr()
    return status, out + err


def logits(source, ids) -> torch.Tensor:
    with torch.no_grad():
        return lrsa.load(source).model(ids).logits.float()


def test_a_greedy_base_with_sampling_settings_is_merged(tiny_copy, monkeypatch, capsys):
    """transformers loads such a generation_config.json and refuses to write it."""
    base = tiny_copy.parent / "greedy"
    shutil.copytree(json.loads((tiny_copy / "adapter_config.json").read_text())["base_model_name_or_path"], base)
    greedy = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}
    (base / "generation_config.json").write_text(json.dumps(greedy))
    options = ["--adapter", str(tiny_copy), "--out", str(base.parent / "out"), "--base-model", str(base)]
    assert run_script(monkeypatch, capsys, *options)[0] == 0
    found = lrsa.load(base.parent / "out").model.generation_config
    assert not found.do_sample and 7 in found.eos_token_id


def test_a_run_is_merged_by_the_command(tiny_copy, monkeypatch, capsys):
    out = tiny_copy.parent / "merged"
    status, text = run_script(monkeypatch, capsys, "--adapter", str(tiny_copy), "--out", str(out))
    assert status == 0 and f"merged: {out}" in text
    model, tokenizer, new_cache = lrsa.load(out)
    assert not isinstance(model, PeftModel) and model.dtype == torch.float32
    assert new_cache().config == lrsa.LRSAConfig.from_pretrained(tiny_copy) == lrsa.LRSAConfig.from_pretrained(out)
    assert lrsa.PromptFormat.from_pretrained(out) == lrsa.PromptFormat.from_pretrained(tiny_copy) is not None
    ids = tokenizer("river fox Anna 3 dog " * 12, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 2 * new_cache().config.dense_length, "some of it is compressed"
    torch.testing.assert_close(logits(out, ids), logits(tiny_copy, ids), atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_copy / json.loads((tiny_copy / "adapter_config.json").read_text())[
        "base_model_name_or_path"])  # fmt: skip
    with torch.no_grad():
        assert (logits(out, ids) - base(ids).logits).abs().max() > 0.1, "the adapter changes the model"
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert 'lrsa.load("merged")' in card.text and "pip install lrsa`" in card.text and str(tiny_copy) not in card.text
    status, text = run_script(monkeypatch, capsys, "--adapter", str(tiny_copy), "--out", str(out))
    assert status == 2 and "already holds files" in text
    status, text = run_script(monkeypatch, capsys, "--adapter", str(out), "--out", str(out / "again"))
    assert status == 2 and "is a model, not an adapter" in text


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True},
                                  {"target_modules": ["q_proj", "embed_tokens"]}])  # fmt: skip
def test_every_kind_of_adapter_is_merged_in_half_precision(tiny_copy, random_llama, kind):
    torch.manual_seed(1)
    base = random_llama.float()
    base.save_pretrained(tiny_copy.parent / "base")
    lrsa.load(tiny_copy).tokenizer.save_pretrained(tiny_copy.parent / "base")
    base.name_or_path = str(tiny_copy.parent / "base")
    tuned = get_peft_model(
        base, LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | kind)
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    tuned.save_pretrained(tiny_copy.parent / "kind")
    lrsa.LRSAConfig(3, 8, 2).save_pretrained(tiny_copy.parent / "kind")
    error, budget = merge(str(tiny_copy.parent / "kind"), tiny_copy.parent / "merged", "bfloat16")
    assert 0 < error < 4 * budget < 0.4
    assert lrsa.load(tiny_copy.parent / "merged").model.dtype == torch.bfloat16


def test_a_merged_model_that_is_not_its_adapter_is_refused(tiny_copy, monkeypatch, capsys):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda model, **options: model.unload())
    out = str(tiny_copy.parent / "merged")
    status, text = run_script(monkeypatch, capsys, "--adapter", str(tiny_copy), "--out", out)
    assert status == 2 and "the merged model's logits differ from the adapter's by" in text and "do not use" in text
