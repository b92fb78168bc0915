"""Bases that other tools have stored quantised: loaded as transformers does, and trained with LRSA."""

from __future__ import annotations

import importlib.util
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lrsa.evaluation import Results
from tests import tiny_run
from tests.tiny_run import SETTINGS, log_of, make_workplace
from train import model
from train.adapter import module_problems
from train.settings.model import LoraSettings, ModelSettings

run_here = partial(tiny_run.run_here, overwrite=True)


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} is not installed")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer):
    settings = SETTINGS | {"train": SETTINGS["train"] | {"max_steps": 3, "logging_steps": 1}}
    settings |= {"eval": {"keep_ratios": [0.25], "rows": 2}, "objective": {"selection": 1.0}}
    place = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, settings)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    return place


def fp8(model: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Blocks of 128 x 128 in FP8 with a scale each, as DeepSeek V3 is stored."""
    stored = dict(model)
    for name, weight in model.items():
        if "_proj" in name:
            blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            stored[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
            stored[f"{name}_scale_inv"] = scale
    return stored, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed_tensors(model: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """One scale for each output channel, weights in FP8, as vLLM's tools store them."""
    stored = dict(model)
    for name, weight in model.items():
        if "_proj" in name:
            scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return stored, {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


def gptq(model: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """4 bits in groups of 128 input channels; eight of these in a number, zeros less one."""
    stored = dict(model)
    for place, codes, zeros, scales in _in_four_bits(stored):
        packed, zeros = codes.unflatten(0, (-1, 8)).transpose(1, 2), (zeros - 1).unflatten(1, (-1, 8))
        stored |= {f"{place}.qweight": _packed(packed), f"{place}.qzeros": _packed(zeros), f"{place}.scales": scales}
        stored[f"{place}.g_idx"] = torch.arange(len(codes), dtype=torch.int32) // 128
    return stored, {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    }  # fmt: skip


def awq(model: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """4 bits in groups of 128 input channels; eight output channels in a number, the even ones first."""
    stored = dict(model)
    for place, codes, zeros, scales in _in_four_bits(stored):
        packed, zeros = (part.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]] for part in (codes, zeros))
        stored |= {f"{place}.qweight": _packed(packed), f"{place}.qzeros": _packed(zeros), f"{place}.scales": scales}
    return stored, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def _in_four_bits(model: dict[str, torch.Tensor]):
    """Takes the layers' weights away; yields name, codes [in, out], zeros [groups, out] and scales [groups, out]."""
    for name in [name for name in model if "_proj" in name]:
        groups = model.pop(name).T.unflatten(0, (-1, 128))  # [groups, 128, out]
        scales = groups.abs().amax(dim=1) / 7
        codes = ((groups / scales[:, None]).round() + 8).clamp(0, 15).long().flatten(0, 1)
        yield name.removesuffix(".weight"), codes, torch.full_like(scales, 8).long(), scales


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """The last dimension, eight codes of 4 bits, as one number."""
    values = (codes << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32).contiguous()


FORMATS = [
    pytest.param(fp8, id="fp8"),
    pytest.param(compressed_tensors, id="ct", marks=needs("compressed_tensors")),
    pytest.param(gptq, id="gptq", marks=needs("gptqmodel", "optimum")),
    pytest.param(awq, id="awq", marks=needs("gptqmodel", "optimum")),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_base_that_is_stored_quantised_is_trained_and_measured(form, workplace, capsys):
    name = f"stored-{form.__name__}"
    AutoTokenizer.from_pretrained(workplace / "model").save_pretrained(workplace / name)
    stored, config = form(load_file(workplace / "model" / "model.safetensors"))
    save_file(stored, workplace / name / "model.safetensors", {"format": "pt"})
    plain = json.loads((workplace / "model" / "config.json").read_text())
    (workplace / name / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    given = [f"model.name_or_path={name}", f"train.output_dir=runs/{name}"]
    layers = "lora.target_modules=[down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]"
    if form in (gptq, awq):
        assert run_here(workplace, *given) == 2
        assert f"name its layers, such as {layers.partition('=')[2]}" in capsys.readouterr().err
        given.append(layers)
    assert run_here(workplace, *given) == 0
    assert run_here(workplace, "train.output_dir=runs/plain") == 0
    ours, full = ([line["loss"] for line in log_of(workplace / "runs" / run)] for run in (name, "plain"))
    assert ours[0] == pytest.approx(full[0], rel=1e-2) and ours[0] != full[0], "the weights are rounded"
    results = Results.load(workplace / "runs" / name)
    assert results.score("LRSA-LoRA", "1/4").value < results.score("base", "1/4").value


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_package_that_is_missing_is_named_before_the_data(method, workplace, monkeypatch, capsys):
    for name in ("optimum", "gptqmodel", "compressed_tensors"):
        for module in ("gptq", "awq", "compressed_tensors"):
            place = f"transformers.quantizers.quantizer_{module}.is_{name}_available"
            monkeypatch.setattr(place, lambda: False, raising=False)
    name = f"missing-{method}"
    AutoTokenizer.from_pretrained(workplace / "model").save_pretrained(workplace / name)
    plain = json.loads((workplace / "model" / "config.json").read_text())
    config = {"quant_method": method, "bits": 4, "group_size": 128, "config_groups": {}, "ignore": []}
    (workplace / name / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    assert run_here(workplace, f"model.name_or_path={name}", "data.path=nowhere.jsonl") == 2
    told = capsys.readouterr().err
    assert "model.name_or_path" in told and "pip install" in told


@pytest.mark.parametrize("form", [gptq, awq, compressed_tensors, fp8])
def test_a_base_is_loaded_so_that_gradients_pass(form, workplace, tmp_path):
    plain = json.loads((workplace / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | {"quantization_config": form({})[1]}))
    loading = model._trainable(ModelSettings(name_or_path=str(tmp_path)))
    if form in (gptq, awq):
        assert loading.quant_method == form.__name__ and loading.get_loading_attributes()["backend"] == "auto_trainable"
    else:
        assert getattr(loading, "dequantize", None) is (True if form is compressed_tensors else None)


def test_all_linear_needs_linear_layers():
    """Packages for GPTQ and AWQ put layers of their own in their place."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    assert module_problems(LoraSettings(), model) == []
    for name, layer in [entry for entry in model.named_modules() if "_proj" in entry[0]]:
        packed = torch.nn.Module()
        packed.register_buffer("qweight", layer.weight.detach().to(torch.int8))
        model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], packed)
    [problem] = module_problems(LoraSettings(), model)
    assert str(problem).startswith(
        "lora.target_modules: all-linear finds no linear layer in this base: name its layers"
    )
    assert "[down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]" in str(problem)
    assert module_problems(LoraSettings(target_modules=["q_proj"]), model) == []
