"""An adapter with its base model, its tokenizer and exactly the cache that it was trained for, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrsa.cache import LRSACache
from lrsa.config import LRSAConfig
from lrsa.hf import apply_lrsa, config_of


class Loaded(NamedTuple):
    """What `load` returns: the model under LRSA, its tokenizer, and a function that makes a new cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_cache: Callable[[], LRSACache]


def load(source: str | Path, config: LRSAConfig | None = None, **model_options) -> Loaded:
    """Load an adapter that was trained with lrsa, or a model into which one was merged.

        model, tokenizer, new_cache = lrsa.load("user/adapter")
        inputs = tokenizer(prompt, return_tensors="pt")
        model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=100)

    Nothing that comes with an adapter or a model is run: weights are read from safetensors only, and a model whose
    repository brings Python code is refused, unless `trust_remote_code=True` or `use_safetensors=False` is given.

    Args:
        source: a directory or Hub id of an adapter with its `lrsa_config.json`, or of a merged model.
        config: settings in place of the stored ones; needed for a model that was not trained with lrsa.
        model_options: passed to `AutoModelForCausalLM.from_pretrained` for the base model (`dtype`, `device_map`, ...).

    Raises:
        ValueError: when there are no LRSA settings, they do not fit the base model, or the adapter is a pickle.
        OSError: when the base model has no safetensors.
        ImportError: when an adapter is loaded and peft is not installed.
    """
    source = str(source)
    options = {"trust_remote_code": False, "use_safetensors": True} | model_options
    if _has(source, "adapter_config.json"):
        from peft import PeftConfig, PeftModel

        refuse_pickle(source)
        config = LRSAConfig.from_pretrained(source) if config is None else config
        peft_config = PeftConfig.from_pretrained(source)
        base_name = peft_config.base_model_name_or_path
        if peft_config.revision:  # of the base that the adapter was trained on
            options = {"revision": peft_config.revision} | options
        model = AutoModelForCausalLM.from_pretrained(base_name, **options)
        model = PeftModel.from_pretrained(model, source)
    else:
        base_name = source
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        # Merging keeps the settings inside the model's own configuration.
        if config is None:
            config = config_of(model) if hasattr(model.config, "lrsa") else LRSAConfig.from_pretrained(source)
    tokenizer_name = source if _has(source, "tokenizer_config.json") else base_name
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=options["trust_remote_code"])
    return Loaded(apply_lrsa(model, config).eval(), tokenizer, lambda: LRSACache(config))


def refuse_pickle(source: str) -> None:
    """Check that an adapter's weights are safetensors; peft would take a pickle, whose loading can run code.

    Raises:
        ValueError: when there is no `adapter_model.safetensors` in the directory or Hub repository.
    """
    if not _has(source, "adapter_model.safetensors"):
        raise ValueError(
            f"{source} holds no adapter_model.safetensors. Other files of weights, such as adapter_model.bin, are "
            "pickles and are not loaded: ask for the adapter in safetensors, or convert it where you trust it."
        )


def _has(source: str, name: str) -> bool:
    """Whether a directory or a Hub repository holds a file."""
    if Path(source).is_dir():
        return (Path(source) / name).is_file()
    from huggingface_hub import file_exists

    return file_exists(source, name)
