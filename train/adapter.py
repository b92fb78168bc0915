"""The LoRA adapter: described for PEFT, begun from another one, verified on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from train.settings.errors import Problem, did_you_mean
from train.settings.schema import LoraSettings

ADAPTER_NAME = "adapter_model.safetensors"


class AdapterError(ValueError):
    """A saved adapter that holds nothing of use."""


def lora_config(settings: LoraSettings, revision: str | None = None) -> LoraConfig:
    """PEFT's configuration of the adapter; `revision` is the base model's."""
    return LoraConfig(**settings.model_dump(), task_type="CAUSAL_LM", revision=revision)


def target_problems(targets: str | list[str], model: PreTrainedModel) -> list[Problem]:
    """Names in `lora.target_modules` that no module of the model has; PEFT would train the others alone."""
    modules = [name for name, _ in model.named_modules()]
    names = [] if isinstance(targets, str) else targets
    missing = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]
    last = {module.rpartition(".")[2] for module in modules}
    return [
        Problem("", "lora.target_modules", f"no module of the model is called {name}{did_you_mean(name, last)}")
        for name in missing
    ]


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
            f"{path} holds {f'empty tensors ({some(empty)})' if empty else 'no tensor'}. Under ZeRO-3 set "
            '"stage3_gather_16bit_weights_on_model_save": true in the zero_optimization part of the DeepSpeed file.'
        )
    if not_finite:
        raise AdapterError(
            f"{path} holds values that are not finite ({some(not_finite)}): training diverged; lower "
            "train.learning_rate, or add train.warmup_steps."
        )
    if not trained:
        raise AdapterError(
            f"{path} is untrained: every lora_B is zero. Was there a step with a learning rate above 0? See "
            "train.max_steps, train.learning_rate and train.warmup_steps."
        )
    return count


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
