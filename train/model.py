"""Loads the base model and its tokenizer as the `model` section says, and describes the adapter for PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train.settings.errors import Problem, SettingsError
from train.settings.schema import LoraSettings, ModelSettings


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


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The base model's config.json alone.

    Raises:
        SettingsError: when there is no such model.
    """
    return _load(AutoConfig, settings)


def lora_config(settings: LoraSettings, revision: str | None = None) -> LoraConfig:
    """PEFT's configuration of the adapter; `revision` is the base model's."""
    return LoraConfig(**settings.model_dump(), task_type="CAUSAL_LM", revision=revision)


def _load(auto_class: type, settings: ModelSettings, **options):
    try:
        return auto_class.from_pretrained(
            settings.name_or_path,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        text = f"cannot be loaded as a causal language model with its tokenizer: {reason}"
        raise SettingsError([Problem("", f"model.name_or_path {settings.name_or_path}", text)]) from error
