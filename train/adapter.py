"""Opens a saved adapter again: a file without weights must fail the run that wrote it, not the person who loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

ADAPTER_NAME = "adapter_model.safetensors"


class AdapterError(ValueError):
    """A saved adapter that holds nothing of use."""


def verify_adapter(directory: str | Path) -> int:
    """Check that a saved LoRA adapter holds trained weights.

    Returns:
        the number of its tensors.

    Raises:
        AdapterError: when the file is missing or unreadable, a tensor is empty or not finite, or all `lora_B` are zero.
    """
    path = Path(directory) / ADAPTER_NAME
    if not path.is_file():
        raise AdapterError(f"{path} was not written: no adapter was saved.")
    empty, not_finite, trained, count = [], [], False, 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                tensor, count = file.get_tensor(name), count + 1
                if tensor.numel() == 0:
                    empty.append(name)
                elif not torch.isfinite(tensor).all():
                    not_finite.append(name)
                trained = trained or ("lora_B" in name and bool(tensor.any()))
    except SafetensorError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if count == 0 or empty:
        raise AdapterError(
            f"{path} holds {f'empty tensors ({_some(empty)})' if empty else 'no tensor'}. Under ZeRO-3 set "
            '"stage3_gather_16bit_weights_on_model_save": true in the zero_optimization part of the DeepSpeed file.'
        )
    if not_finite:
        raise AdapterError(
            f"{path} holds values that are not finite ({_some(not_finite)}): training diverged; lower "
            "train.learning_rate, or add train.warmup_steps."
        )
    if not trained:
        raise AdapterError(
            f"{path} is untrained: every lora_B is zero. Was there a step with a learning rate above 0? See "
            "train.max_steps, train.learning_rate and train.warmup_steps."
        )
    return count


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
