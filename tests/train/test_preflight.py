"""What the libraries refuse late, with a traceback, is a message about a setting before the data are built."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_run import ONE_STEP, make_workplace, run_here

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, ONE_STEP)


def refused(workplace: Path, capsys, *overrides: str) -> str:
    """The message of a run that is refused before its data are built."""
    assert run_here(workplace, *overrides, overwrite=True) == 2
    told = capsys.readouterr()
    assert "Data:" not in told.out and not (workplace / "run").exists()
    return told.err.rpartition("\n\n")[2].strip()


def lfs_pointer(model: Path) -> None:
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def truncated(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_a_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def configured(**values):
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (lfs_pointer, ["weights are damaged or incomplete", "git lfs pull"]),
        (truncated, ["weights are damaged or incomplete"]),
        (without_a_tensor, ["no weights for model.layers.0.self_attn.o_proj.weight"]),
        (configured(intermediate_size=128), ["model.layers.0.mlp.down_proj.weight of [32, 64], not [32, 128]"]),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), ["pip install optimum"]),
    ],
    ids=["lfs", "truncated", "missing", "mismatched", "quantized"],
)
def test_weights_that_are_no_model(workplace, tmp_path, capsys, spoil, messages):
    if spoil.__name__ == "change" and "optimum" in messages[0] and importlib.util.find_spec("optimum"):
        pytest.skip("optimum is installed")
    model = tmp_path / "model"
    shutil.copytree(workplace / "model", model)
    spoil(model)
    message = refused(workplace, capsys, f"model.name_or_path={model}")
    assert message.startswith(f"model.name_or_path {model}")
    assert all(text in message for text in messages), message


@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("train.report_to=codecarbon", "codecarbon"),
        ("train.optim=galore_adamw", "galore_torch"),
        ("train.use_liger_kernel=true", "liger_kernel"),
    ],
)
def test_packages_that_are_missing(workplace, capsys, setting, package):
    assert importlib.util.find_spec(package) is None, "take another package that nobody installs for the tests"
    message = refused(workplace, capsys, setting)
    assert message.startswith(setting.partition("=")[0]) and "pip install" in message and len(message.splitlines()) == 1


def test_offloading_to_the_memory_that_activations_are_in(workplace, capsys):
    message = refused(workplace, capsys, "train.activation_offloading=true")
    assert message.startswith("train.activation_offloading must be false on a CPU")


def test_numbers_in_the_deepspeed_file_that_contradict_the_run(workplace, tmp_path, capsys):
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}))
    message = refused(workplace, capsys, f"train.deepspeed={file}", "train.per_device_train_batch_size=2")
    assert "train.deepspeed: contradicts section train (ds train_micro_batch_size_per_gpu=4 vs hf" in message
    assert "write auto in the file" in message
