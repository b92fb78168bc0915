"""Adapters, models and configurations of strangers: loading them runs no code and writes nothing elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import data
import lrsa
from data.settings import DataSettings
from launch.command_line import explain
from lrsa import LRSAConfig
from tests.tiny_run import make_workplace
from train.evaluation import load_variants
from train.model import load_model
from train.settings.errors import SettingsError
from train.settings.load import load_settings
from train.settings.schema import ModelSettings


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


CODE = """
import pathlib
pathlib.Path({mark!r}).mkdir()
from transformers import LlamaConfig, LlamaForCausalLM

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def mark(tmp_path) -> Path:
    """What code of a stranger would leave behind."""
    return tmp_path / "code-was-run"


@pytest.fixture
def adapter(random_llama, byte_tokenizer, tmp_path) -> Path:
    """A base with tokenizer and its adapter; no other test shares them."""
    random_llama.resize_token_embeddings(len(byte_tokenizer))
    random_llama.save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    random_llama.name_or_path = str(tmp_path / "base")
    get_peft_model(random_llama, LoraConfig(r=2, init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    LRSAConfig(3, 8, 2).save_pretrained(tmp_path / "adapter")
    lrsa.load(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_trap_works(mark):
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.is_dir()


@pytest.mark.parametrize("real", [True, False])
def test_a_pickled_adapter_is_not_loaded(adapter, mark, real):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights if real else weights | {"trap": Trap(mark)}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors.*are pickles and are not loaded"):
        lrsa.load(adapter)
    settings = load_settings("quickstart.yaml", [f"model.name_or_path={adapter.parent / 'base'}", "train.use_cpu=true"])
    with pytest.raises(SettingsError, match="are pickles and are not loaded"):
        load_variants(settings, adapter)
    assert not mark.exists()


def test_a_pickled_base_is_not_loaded(adapter, mark):
    base = adapter.parent / "base"
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights | {"trap": Trap(mark)}, base / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        lrsa.load(adapter)
    with pytest.raises(SettingsError, match=r"model\.safetensors"):
        load_model(ModelSettings(name_or_path=str(base)))
    assert not mark.exists()


def test_code_of_a_repository_runs_only_when_asked(adapter, mark, monkeypatch):
    base = adapter.parent / "base"
    config = json.loads((base / "config.json").read_text()) | {"model_type": "strange"}
    config["auto_map"] = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "strange.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers would ask on the terminal
    with pytest.raises(ValueError, match="trust_remote_code"):
        lrsa.load(adapter)
    with pytest.raises(SettingsError, match="trust_remote_code"):
        load_model(ModelSettings(name_or_path=str(base)))
    assert not mark.exists()
    load_model(ModelSettings(name_or_path=str(base), trust_remote_code=True))
    assert mark.is_dir()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/object/new:dict"]
)
def test_yaml_tags_make_no_objects(tmp_path, mark, tag):
    file = tmp_path / "strange.yaml"
    file.write_text(f"model:\n  name_or_path: x\nlrsa:\n  top_k: {tag} ['{mark}']\n")
    with pytest.raises(SettingsError, match=r"strange\.yaml:4: not valid YAML: could not determine a constructor"):
        load_settings(str(file))
    with pytest.raises(SettingsError, match=r"--set lrsa\.top_k: not valid YAML: could not determine a constructor"):
        load_settings("quickstart.yaml", [f"lrsa.top_k={tag} ['{mark}']"])
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", "null", '{"top_k": "__import__"}', '{"__class__": "os.system"}', "[" * 10**5, "\x00", "9" * 5000],
)
def test_odd_settings_beside_an_adapter_are_refused(adapter, content):
    (adapter / "lrsa_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"lrsa_config\.json: "):
        lrsa.load(adapter)


@pytest.mark.parametrize(
    ("section", "values"),
    [("tensorboard", {"enabled": True, "output_path": "../up"}),
     ("csv_monitor", {"enabled": True, "output_path": "/up"}),
     ("flops_profiler", {"enabled": True, "output_file": "../up"})],
)  # fmt: skip
def test_deepspeed_writes_nothing_elsewhere(tmp_path, section, values):
    (tmp_path / "zero.json").write_text(json.dumps({section: values}))
    with pytest.raises(
        SettingsError, match=rf"train\.deepspeed: .*{section}\.output_.* writes outside train.output_dir"
    ):
        load_settings("quickstart.yaml", [f"train.deepspeed={tmp_path / 'zero.json'}"])
    with pytest.raises(SettingsError, match=rf"{section}\.output_.* writes outside train.output_dir"):
        load_settings("quickstart.yaml", ["train.deepspeed=" + json.dumps({section: values})])


def test_no_other_setting_of_the_trainer_names_a_path_that_is_written():
    """A new release that adds one makes this fail."""
    from train.settings.schema import TrainSettings

    paths = [name for name in TrainSettings.model_fields if {"dir", "path", "file"} & set(name.split("_"))]
    assert paths == ["output_dir"]


def test_a_run_writes_into_its_directory_only(tmp_path, byte_tokenizer):
    from train.run import run

    workplace = make_workplace(tmp_path, byte_tokenizer)
    before = {path for path in workplace.rglob("*")}
    names = ["train.run_name=../../up", "train.project=../up", "train.report_to=none", "train.max_steps=2"]
    names += ["eval.enabled=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        settings = load_settings("run.yaml", ["train.output_dir=mine", *names])
        assert explain(lambda: run(settings)) == 0
    new = {path.relative_to(workplace).parts[0] for path in set(workplace.rglob("*")) - before}
    assert new == {"mine"}


def test_names_of_data_sets_lead_nowhere(tmp_path, monkeypatch, byte_tokenizer):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("text\nriver fox\n")
    settings = DataSettings(kind="text", path=str(tmp_path / "data"), name="../../up", eval_rows=0)
    with pytest.raises(data.DataError, match=r"data\.name \.\./\.\./up"):
        data.load(settings, byte_tokenizer, 0, 20)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["data"]
