"""The LoRA adapter: described for PEFT, begun from another one, verified on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrsa.loading import fetch_adapter, refuse_pickle
from train.settings.errors import Problem, SettingsError, did_you_mean
from train.settings.model import CHANGE_THE_BASE, LoraSettings

ADAPTER_NAME = "adapter_model.safetensors"
# What of a stored adapter a run that continues it takes over, and what neither changes its weights nor their meaning.
SHAPE = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save")
FREE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
FREE += ("peft_type", "lora_dropout", "init_lora_weights", "runtime_config")


class AdapterError(ValueError):
    """A saved adapter that holds nothing of use."""


def lora_config(settings: LoraSettings, revision: str | None = None) -> LoraConfig:
    """PEFT's configuration of the adapter; `revision` is the base model's."""
    return LoraConfig(**settings.model_dump(exclude={"init_from"}), task_type="CAUSAL_LM", revision=revision)


def continued(settings: LoraSettings) -> LoraSettings:
    """The settings with the shape of the adapter that `init_from` names, which is read only while some of it is open.

    Raises:
        SettingsError: when there is no such adapter, it is of a kind that cannot be trained here, or the settings say
            something else.
    """
    if settings.init_from is None or settings.model_fields_set.issuperset(SHAPE):
        return settings
    return settings.model_copy(update=_shape_of(settings, *_adapter(settings.init_from)))


def start_from(model: PeftModel, settings: LoraSettings) -> None:
    """Load the weights of `init_from` into a model that carries an adapter of the same shape.

    Raises:
        SettingsError: when the adapter is of another base model or another shape.
    """
    source, (directory, config) = settings.init_from, _adapter(settings.init_from)
    _shape_of(settings, directory, config)
    ours, theirs = model.get_base_model().config.name_or_path, config.base_model_name_or_path
    if theirs and ours != theirs and not Path(ours).exists() and not Path(theirs).is_absolute():
        raise _refusal(source, f"is an adapter of {theirs}, not of {ours}: set model.name_or_path to it")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
        wrong = sorted(trained.intersection(result.missing_keys)) + result.unexpected_keys
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise _refusal(source, f"does not fit {ours} with the settings of section lora: {error}") from error
    if wrong:
        raise _refusal(source, f"has other modules than lora.target_modules ({some(wrong)}): leave that out")


def _adapter(source: str) -> tuple[Path, LoraConfig]:
    try:
        directory = fetch_adapter(source, {})
        if directory is None:
            raise ValueError("it holds no adapter_config.json")
        refuse_pickle(directory)
        return directory, PeftConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refusal(source, f"cannot be loaded as an adapter: {error}") from error


def _shape_of(settings: LoraSettings, directory: Path, config: LoraConfig) -> dict[str, object]:
    """The values of `SHAPE` of a stored adapter."""
    if not isinstance(config, LoraConfig):
        raise _refusal(settings.init_from, f"is a {config.peft_type} adapter: only LoRA can be continued")
    shape = {name: getattr(config, name) for name in SHAPE}
    shape["target_modules"] = _plain(shape["target_modules"])
    start = str(config.init_lora_weights)
    if start.startswith(CHANGE_THE_BASE):
        text = f"was begun with {start}, which changes the base weights: convert it to a LoRA adapter (PEFT's "
        raise _refusal(settings.init_from, f"{text}save_pretrained(path_initial_model_for_weight_conversion=...))")
    neutral = LoraConfig()
    free = {*SHAPE, *FREE}
    others = [f.name for f in fields(LoraConfig) if f.name not in free]
    others = [name for name in others if getattr(config, name) != getattr(neutral, name)]
    if others:
        raise _refusal(settings.init_from, f"was trained with {', '.join(others)}, which is no setting here")
    for name in settings.model_fields_set & shape.keys():
        ours = _plain(getattr(settings, name))
        if ours != shape[name] and ours != "all-linear":  # that one is compared by its modules
            text = f"must be {shape[name]} as in {settings.init_from}, got {ours}: leave it out"
            raise SettingsError([Problem("", f"lora.{name}", text)])
    return {name: value for name, value in shape.items() if name not in settings.model_fields_set}


def _plain(names: str | Iterable[str] | None) -> object:
    return sorted(names) if isinstance(names, list | set | tuple) else names


def _refusal(source: str, text: str) -> SettingsError:
    return SettingsError([Problem("", f"lora.init_from {source}", text)])


def module_problems(settings: LoraSettings, model: PreTrainedModel) -> list[Problem]:
    """Names in `lora.target_modules` that no module of the model has (PEFT would train the others alone), and what of
    `lora.modules_to_save` cannot be trained whole."""
    modules = [name for name, _ in model.named_modules()]
    last = {module.rpartition(".")[2] for module in modules}
    targets, saved = settings.target_modules, settings.modules_to_save or []
    given = [("lora.target_modules", name) for name in ([] if isinstance(targets, str) else targets)]
    problems = [
        Problem("", field, f"no module of the model is called {name}{did_you_mean(name, last)}")
        for field, name in given + [("lora.modules_to_save", name) for name in saved]
        if not any(f".{module}".endswith(f".{name}") for module in modules)
    ]
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    if targets == "all-linear" and all(module is head for module in linear):  # GPTQ and AWQ have classes of their own
        packed = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "qweight")})
        text = f"all-linear finds no linear layer in this base: name its layers, such as [{', '.join(packed)}]"
        problems.append(Problem("", "lora.target_modules", text))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shared = [name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding and p is head]
    for name in saved:
        if any(f".{place}".endswith(f".{name}.weight") for place in shared):
            text = "is shared by embeddings and head in this model; trained whole it would part them: leave it out"
            problems.append(Problem("", f"lora.modules_to_save {name}", text))
    if saved and hasattr(embedding, "ds_id"):
        text = "cannot be used under ZeRO-3, which splits the modules before they are copied: use deepspeed/zero2.json"
        problems.append(Problem("", "lora.modules_to_save", text))
    return problems


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
