"""Adapters: every kind that can be trained, continuing one, and refusing what is of no use."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lrsa
from tests import tiny_run
from tests.tiny_run import log_of, make_workplace
from train.adapter import AdapterError, continued, lora_config, start_from, verify_adapter
from train.settings.load import load_settings

SETTINGS = {
    "model": {"name_or_path": "model"},
    "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 2},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
    "eval": {"enabled": False},
}
FIRST = ["train.output_dir=first", "lora.r=4", "lora.use_rslora=true", "train.learning_rate=0.05"]
CONTINUED = ["lora.init_from=first", "train.learning_rate=1e-12", "train.max_steps=1"]


run_here = partial(tiny_run.run_here, overwrite=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    directory = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)
    assert run_here(directory, *FIRST) == 0
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_an_adapter_is_continued_under_another_compression(workplace):
    assert run_here(workplace, *CONTINUED, "train.output_dir=second", "lrsa.top_k=4") == 0
    first, second = weights(workplace / "first"), weights(workplace / "second")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-7, rtol=0)
    stored = load_settings(str(workplace / "second" / "config.yaml"))
    assert (stored.lora.r, stored.lora.use_rslora, stored.lrsa.top_k) == (4, True, 4)
    assert "init_from a local adapter" in (workplace / "second" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lora.r=8"], "lora.r must be 4 as in "),
        (["lora.init_from=nowhere/at/all"], "lora.init_from: no such directory of an adapter: nowhere/at/all"),
        (["lora.init_from=model"], "model: cannot be loaded as an adapter: it holds no adapter_config.json"),
        (["train.output_dir=first"], "first holds the adapter of lora.init_from, which would be lost"),
        (["lora.init_from=pissa"], "was begun with pissa_niter_4, which changes the base weights"),
        (["lora.init_from=ranks"], "was trained with rank_pattern, which is no setting here"),
        (["lora.init_from=short"], "has other modules than lora.target_modules (base_model"),
        (["lora.init_from=wide"], "does not fit"),
        (["lora.init_from=ia3"], "is a PeftType.IA3 adapter: only LoRA can be continued"),
        (["lora.modules_to_save=[lm_head]"], "lora.modules_to_save must be None as in"),
    ],
)
def test_adapters_that_cannot_be_continued(workplace, monkeypatch, capsys, given, message):
    spoilt = given[0].rpartition("=")[2]
    changes = {
        "pissa": {"init_lora_weights": "pissa_niter_4"}, "ranks": {"rank_pattern": {"q_proj": 2}}, "wide": {"r": 8},
        "short": {}, "ia3": {"peft_type": "IA3"},
    }  # fmt: skip
    if spoilt in changes:
        shutil.copytree(workplace / "first", workplace / spoilt)
        path = workplace / spoilt / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes[spoilt]))
    if spoilt == "short":
        save_file(dict(list(weights(workplace / "first").items())[:-2]), workplace / "short/adapter_model.safetensors")
    assert run_here(workplace, *CONTINUED, "train.output_dir=refused", *given) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_base_is_not_continued(workplace, random_llama, monkeypatch):
    monkeypatch.chdir(workplace)
    path = workplace / "first" / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "org/other"}))
    settings = load_settings("run.yaml", CONTINUED).lora
    model = get_peft_model(random_llama, lora_config(continued(settings)))
    model.get_base_model().config.name_or_path = "org/base"
    with pytest.raises(ValueError, match=r"is an adapter of org/other, not of org/base: set model\.name_or_path to it"):
        start_from(model, settings)
    path.write_text(before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["use_dora=true", "modules_to_save=[lm_head]", "init_lora_weights=gaussian"])
def test_without_its_adapter_the_model_is_the_base(workplace, kind):
    """The teacher is the model with its adapter off: with the full cache the first step has nothing to distil, and a
    second one has."""
    name = kind.partition("=")[0]
    given = ["objective.distillation=1", "objective.keep_ratios=[1.0]", "lrsa.top_k=8", "train.learning_rate=0.05"]
    assert run_here(workplace, f"train.output_dir={name}", f"lora.{kind}", *given) == 0
    first, second = [line["distillation"] for line in log_of(workplace / name)]
    assert abs(first) < 1e-6 < 1e-3 < second
    model, _, _ = lrsa.load(workplace / name)
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(lrsa.remove_lrsa(model)(ids).logits, base(ids).logits)
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert isinstance(model, PeftModel) and any("lora_" in key for key in weights(workplace / name))


@pytest.mark.slow
def test_what_a_trained_head_teaches_comes_from_the_base(workplace):
    """Only the head differs from the base: had the teacher the trained head, there would be nothing to distil."""
    given = ["objective.distillation=1", "objective.keep_ratios=[1.0]", "lrsa.top_k=8"]
    assert run_here(workplace, "train.output_dir=head", "lora.modules_to_save=[lm_head]", *given) == 0
    path = workplace / "head" / "adapter_model.safetensors"
    factors = {name: 0.0 if "lora_B" in name else 1.5 if "lm_head" in name else 1.0 for name in load_file(path)}
    save_file({name: tensor * factors[name] for name, tensor in load_file(path).items()}, path)
    again = ["lora.init_from=head", "train.output_dir=again", "train.max_steps=1", "train.learning_rate=1e-5"]
    assert run_here(workplace, *again, *given) == 0
    assert log_of(workplace / "again")[0]["distillation"] > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lora.init_lora_weights=pissa", "cannot be pissa: it takes its start out of the base weights"),
        ("lora.init_lora_weights=false", "must be true or gaussian, got False"),
        ("lora.modules_to_save=[lm_haed]", "no module of the model is called lm_haed; did you mean lm_head?"),
    ],
)
def test_adapters_that_cannot_be_trained(workplace, capsys, given, message):
    try:
        assert run_here(workplace, "train.output_dir=refused", given) == 2
        assert message in capsys.readouterr().err
    except ValueError as error:  # refused when the settings are read
        assert message in str(error)


def test_a_shared_embedding_is_not_trained_whole(workplace, byte_tokenizer, capsys):
    config = AutoConfig.from_pretrained(workplace / "model", tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(workplace / "tied")
    byte_tokenizer.save_pretrained(workplace / "tied")
    given = ["model.name_or_path=tied", "lora.modules_to_save=[embed_tokens]", "train.output_dir=refused"]
    assert run_here(workplace, *given) == 2
    assert "is shared by embeddings and head in this model" in capsys.readouterr().err


def test_verify_adapter_refuses_what_is_of_no_use(tmp_path):
    up, down = "model.q_proj.lora_B.weight", "model.q_proj.lora_A.weight"
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(AdapterError, match="was not written"):
        verify_adapter(tmp_path)
    for tensors, message in [
        ({}, "holds no tensor"),
        ({down: torch.ones(2, 4), up: torch.empty(0)}, r"empty tensors \(model.q_proj.lora_B.weight\).*gather_16bit"),
        ({down: torch.ones(2, 4), up: torch.zeros(4, 2)}, "untrained: every lora_B is zero"),
        ({down: torch.full((2, 4), float("nan")), up: torch.ones(4, 2)}, "not finite.*lora_A"),
    ]:
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=message):
            verify_adapter(tmp_path)
    path.write_bytes(b"short")
    with pytest.raises(AdapterError, match="cannot be read"):
        verify_adapter(tmp_path)
    save_file({down: torch.ones(2, 4), up: torch.ones(4, 2)}, path)
    assert verify_adapter(tmp_path) == 2
