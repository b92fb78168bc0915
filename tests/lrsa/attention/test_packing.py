"""Packed documents through the real trainer: one step over them is one step over the documents alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrsa.attention import documents
from tests.tiny_run import make_workplace, run_here


@pytest.fixture(scope="module")
def step(tmp_path_factory, byte_tokenizer):
    """Takes one step over all 16 documents and returns its log line and the adapter."""
    workplace = make_workplace(tmp_path_factory.mktemp("packing"), byte_tokenizer)
    torch.set_num_threads(1)

    def take(name: str, *overrides: str) -> tuple[dict, torch.Tensor]:
        settings = ["lora.lora_dropout=0", "eval.control=false", "train.save_strategy=no"]
        settings += ["train.max_steps=1", "train.logging_steps=1", f"train.output_dir={name}", *overrides]
        assert run_here(workplace, *settings) == 0
        line = json.loads((workplace / name / "log.jsonl").read_text().splitlines()[0])
        tensors = load_file(Path(workplace / name / "adapter_model.safetensors"))
        return line, torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    return take


ALONE = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=16")
FOURS = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")
ROWS = "train.per_device_train_batch_size=16"  # more than there are packed rows


def error(found, expected, name: str) -> float:
    return abs(found[0][name] / expected[0][name] - 1)


def test_one_packed_step_is_one_step_over_the_documents_alone(step):
    alone, padded, fours = step("alone", *ALONE), step("padded", ROWS), step("fours", *FOURS)
    assert alone[0]["kept_fraction"] < 0.9, "too little is dropped to tell"
    # How far other ways to add up the same tokens are apart in fp32.
    noise = {n: max(error(padded, alone, n), error(fours, alone, n), 2**-23) for n in ("loss", "grad_norm")}
    apart = max((other[1] - alone[1]).abs().max().item() for other in (padded, fours))
    for strategy in ("bfd", "bfd_split"):
        packed = step(strategy, ROWS, "train.packing=true", f"train.packing_strategy={strategy}")
        assert packed[0]["num_tokens"] == alone[0]["num_tokens"] and packed[0]["epoch"] == 1
        assert packed[0]["kept_fraction"] == alone[0]["kept_fraction"]
        for name, limit in noise.items():
            assert error(packed, alone, name) <= 4 * limit, f"{strategy}: {name}"
        torch.testing.assert_close(packed[1], alone[1], rtol=0, atol=4 * apart)


def test_documents_that_saw_each_other_would_show(step, monkeypatch):
    packed = step("apart", ROWS, "train.packing=true")
    find = documents.find_documents
    monkeypatch.setattr(documents, "find_documents", lambda mask, positions, shape: find(mask, None, shape))
    assert error(step("mixed", ROWS, "train.packing=true"), packed, "loss") > 1e-4
