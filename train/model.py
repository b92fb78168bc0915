"""Base model, tokenizer and LoRA adapter: loaded as the `model` section says, described for PEFT, verified on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from train.failures import is_out_of_memory
from train.settings.errors import Problem, SettingsError, did_you_mean
from train.settings.schema import LoraSettings, ModelSettings

ADAPTER_NAME = "adapter_model.safetensors"


class AdapterError(ValueError):
    """A saved adapter that holds nothing of use."""


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token and the chat template that the settings ask for.

    Raises:
        SettingsError: when there is no such model, or the tokenizer has no token to pad with.
    """
    tokenizer = _load(AutoTokenizer, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        text = "its tokenizer has no pad, end-of-text or unknown token: add a pad_token to its tokenizer_config.json"
        raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", text)])
    if settings.chat_template == "none":
        tokenizer.chat_template = None
    elif settings.chat_template is not None:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_model(settings: ModelSettings) -> PreTrainedModel:
    """The base model in the settings' dtype, with its own attention.

    Raises:
        SettingsError: when there is no such model, or it is not a causal language model.
    """
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else "auto"
    # Other weights than safetensors are pickles: code, as that which trust_remote_code allows.
    return _load(AutoModelForCausalLM, settings, dtype=dtype, use_safetensors=not settings.trust_remote_code or None)


def check_weights(settings: ModelSettings) -> None:
    """Compare the model's files with its configuration; no weight is kept, so it costs little.

    Raises:
        SettingsError: when the weights are damaged or of another shape, some are missing, or a quantised model's
            package is not installed.
    """
    quantized = getattr(load_config(settings), "quantization_config", None)
    if quantized is not None:  # its weights need the device that they are made for
        try:
            AutoHfQuantizer.from_config(quantized).validate_environment(device_map=None)
        except ImportError as error:
            raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", str(error))]) from error
        return
    safe = not settings.trust_remote_code or None
    options = {"device_map": "meta", "output_loading_info": True, "use_safetensors": safe}
    info = _load(AutoModelForCausalLM, settings, ignore_mismatched_sizes=True, **options)[1]
    texts = [f"no weights for {_some(names)}" for names in [sorted(info["missing_keys"])] if names]
    texts += [f"{name} of {list(has)}, not {list(needs)}" for name, has, needs in sorted(info["mismatched_keys"])[:3]]
    if texts:
        text = (
            f"its files hold {'; '.join(texts)} as config.json says: download the model again, or correct config.json"
        )
        raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", text)])


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The base model's config.json alone.

    Raises:
        SettingsError: when there is no such model.
    """
    return _load(AutoConfig, settings)


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


def token_problems(tokenizer: PreTrainedTokenizerBase, highest: int, model: PreTrainedModel) -> list[Problem]:
    """Tokens that the model has no embedding for, of those in the rows (`highest` is their largest id) and padding."""
    token, count = max(highest, tokenizer.pad_token_id), model.get_input_embeddings().num_embeddings
    if token < count:
        return []
    text = (
        f"token {tokenizer.convert_ids_to_tokens(token)} has id {token}, but the model has {count} embeddings: use the "
        "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save the model"
    )
    return [Problem("", "model.name_or_path", text)]


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


def _load(auto_class: type, settings: ModelSettings, **options):
    try:
        return auto_class.from_pretrained(
            settings.name_or_path,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    except SafetensorError as error:
        text = (
            f"its weights are damaged or incomplete ({error}): download them again; for a Git LFS pointer, run git lfs "
            "pull"
        )
        raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", text)]) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        text = f"cannot be loaded as a causal language model with its tokenizer: {reason}"
        raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", text)]) from error
