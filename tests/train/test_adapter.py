"""A saved adapter that holds nothing of use fails the run that wrote it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from train.adapter import AdapterError, verify_adapter


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
