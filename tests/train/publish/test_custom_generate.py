"""`custom_generate` as transformers loads it from a folder that is ready to be published."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import lrsa
from lrsa.cache import CACHE_ARGUMENT
from train.publish.hub import prepare

LENGTH = 60
GENERATE = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def local_code(monkeypatch, tmp_path):
    """transformers copies code here before it runs it, and has not run any yet."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def folder(tiny_copy, local_code) -> str:
    """What would be published, loaded by transformers as local code."""
    return str(prepare(tiny_copy, "user/tiny", None, base_model="org/base")[1])


def test_custom_generate_carries_the_settings_of_the_adapter(folder):
    text = (Path(folder) / "custom_generate" / "settings.py").read_text()
    found: dict = {}
    exec(text, found)
    assert found["SETTINGS"] == json.loads((Path(folder) / "lrsa_config.json").read_text())


def test_custom_generate_takes_generate_s_arguments_and_its_own_cache_only(folder, tiny_run):
    model, _, new_cache = lrsa.load(tiny_run)
    lm = model.get_base_model()
    options = GENERATE | {"custom_generate": folder, "trust_remote_code": True}
    ids = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    expected = model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: new_cache()}, **GENERATE)
    cache = new_cache()
    found = lm.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **options)
    assert torch.equal(found, expected) and cache.get_seq_length() == LENGTH + 29
    assert lm.config._attn_implementation == "lrsa", "a model under LRSA stays so"
    with pytest.raises(ValueError, match=r"must be an lrsa\.LRSACache, got DynamicCache: leave it out"):
        lm.generate(ids, **{CACHE_ARGUMENT: DynamicCache()}, **options)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        lm.generate(ids, custom_generate=folder, trust_remote_code=False)


def test_custom_generate_stops_where_training_ended_answers(tiny_copy, tiny_run, local_code):
    """The end of turn is neither the base's nor the tokenizer's end of text, as with Qwen2.5's base models."""
    model, _, new_cache = lrsa.load(tiny_run)
    ids = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    free = model.generate(ids, **{CACHE_ARGUMENT: new_cache()}, **GENERATE)[0, LENGTH:].tolist()
    prompt = json.loads((tiny_copy / "lrsa_prompt.json").read_text())
    assert prompt["end"] == 1 and free[5] != 1
    (tiny_copy / "lrsa_prompt.json").write_text(json.dumps(prompt | {"end": free[5]}))
    folder = str(prepare(tiny_copy, "user/tiny", None, base_model="org/base")[1])
    options = {name: value for name, value in GENERATE.items() if name != "eos_token_id"}
    options |= {"custom_generate": folder, "trust_remote_code": True}
    found = model.get_base_model().generate(ids, **options)[0, LENGTH:].tolist()
    assert found == free[: free.index(free[5]) + 1]
    loaded, _, new_cache = lrsa.load(tiny_copy)
    del options["custom_generate"], options["trust_remote_code"]
    assert loaded.generate(ids, **{CACHE_ARGUMENT: new_cache()}, **options)[0, LENGTH:].tolist() == found


class NotInstalled:
    def find_spec(self, name, *args):
        if name == "lrsa":
            raise ModuleNotFoundError("No module named 'lrsa'")


def test_custom_generate_says_what_is_missing(folder, tiny_run, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_run.parents[1] / "base")
    monkeypatch.delitem(sys.modules, "lrsa")
    monkeypatch.setattr("sys.meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(ImportError, match="pip install lrsa"):
        model.load_custom_generate(folder, trust_remote_code=True)
