"""An adapter with its base model, its tokenizer and exactly the cache that it was trained for, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lrsa.base_loading import BaseLoading
from lrsa.cache import LRSACache
from lrsa.config import LRSAConfig
from lrsa.hf import apply_lrsa, config_of
from lrsa.prompt import PromptFormat

# Of an adapter's repository: nothing that is code or a pickle.
FILES = [
    *("adapter_config.json", "adapter_model.safetensors", "lrsa_*.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*", "additional_chat_templates/*.jinja"),
]


class Loaded(NamedTuple):
    """What `load` returns: the model under LRSA, its tokenizer, and a function that makes a new cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_cache: Callable[[], LRSACache]


def load(
    source: str | Path,
    config: LRSAConfig | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    auto_class: type = AutoModelForCausalLM,
    **model_options,
) -> Loaded:
    """Load an adapter that was trained with lrsa, or a model into which one was merged.

        model, tokenizer, new_cache = lrsa.load("user/adapter")
        inputs = tokenizer(prompt, return_tensors="pt")
        model.generate(**inputs, past_key_values=new_cache(), max_new_tokens=100)

    Generation stops where training ended answers; `PromptFormat.from_pretrained(source)` makes the prompts of training.

    Nothing that comes with an adapter or a model is run: weights are read from safetensors only, and a model whose
    repository brings Python code is refused, unless `trust_remote_code=True` or `use_safetensors=False` is given.

    Args:
        source: a directory or Hub id of an adapter with its `lrsa_config.json`, or of a merged model.
        config: settings in place of the stored ones; needed for a model that was not trained with lrsa.
        revision: branch, tag or commit of `source` on the Hub. The base model's own is what the adapter was trained on.
        base_model: directory or Hub id of an adapter's base model, when it is no longer where it was in training.
        auto_class: what makes the model; `AutoModelForImageTextToText` for one that is to see images.
        model_options: passed to its `from_pretrained` for the base model (`dtype`, `device_map`, ...); `token`,
            `cache_dir` and `local_files_only` count for the adapter too.

    Raises:
        ValueError: when there are no LRSA settings, they do not fit the base model, the adapter is a pickle or of
            another base model, or `base_model` is given for a model.
        OSError: when the base model is not there or has no safetensors.
        ImportError: when an adapter is loaded and peft is not installed.
    """
    options = {"trust_remote_code": False, "use_safetensors": True} | model_options
    hub = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if name in options}
    tokenizer_options = hub | {"trust_remote_code": options["trust_remote_code"]}
    found = hub | {"revision": revision}
    adapter = fetch_adapter(str(source), found)
    if adapter is None:
        if base_model is not None:
            raise ValueError(f"base_model is for an adapter, and {source} is a model: leave base_model out")
        model = auto_class.from_pretrained(source, revision=revision or "main", **options)
        # Merging keeps the settings inside the model's own configuration.
        if config is None and hasattr(model.config, "lrsa"):
            config = config_of(model)
        elif config is None:
            config = LRSAConfig.from_pretrained(source, revision=revision, **hub)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", **tokenizer_options)
    else:
        config = LRSAConfig.from_pretrained(adapter) if config is None else config
        model, base = _base_with_adapter(adapter, base_model, options, auto_class)
        own = {"pretrained_model_name_or_path": adapter} if (adapter / "tokenizer_config.json").is_file() else base
        tokenizer = AutoTokenizer.from_pretrained(**own, **tokenizer_options)
    prompt = PromptFormat.from_pretrained(source if adapter is None else adapter, **({} if adapter else found))
    if prompt is not None:
        prompt.add_end_to(model.generation_config)
    return Loaded(apply_lrsa(model, config).eval(), tokenizer, lambda: LRSACache(config))


def _base_with_adapter(
    adapter: Path, base_model: str | Path | None, options: dict, auto_class: type
) -> tuple[PreTrainedModel, dict]:
    """The model, and the name and revision of its base as `from_pretrained` takes them."""
    from peft import PeftConfig

    refuse_pickle(adapter)
    config = PeftConfig.from_pretrained(adapter)
    name = base_model or config.base_model_name_or_path
    base = {"pretrained_model_name_or_path": name, "revision": "main" if base_model else config.revision or "main"}
    loading = BaseLoading.from_pretrained(adapter)
    hub = {n: options[n] for n in ("token", "cache_dir", "local_files_only", "trust_remote_code") if n in options}
    try:
        source = {"source": name, "revision": base["revision"]}
        model = auto_class.from_pretrained(**base, **(options | loading.options(**source, **hub)))
    except OSError as error:
        raise OSError(f"base model {name} cannot be loaded: {error}; if it moved, pass base_model=...") from error
    return attach_adapter(loading.check(model), adapter), base | loading.files()


def attach_adapter(model: PreTrainedModel, adapter: Path, name: str = "default") -> PreTrainedModel:
    """The PEFT model of a base model, or a PEFT model with one adapter more, under `name`.

    Raises:
        ValueError: when the weights are pickles, or are not those of this base: peft would load what fits, and warn.
    """
    from peft import PeftModel, get_peft_model_state_dict

    refuse_pickle(adapter)
    refused = f"{adapter} is an adapter of another base model, or is damaged"
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter), adapter_name=name)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(f"{refused}: {str(error).splitlines()[1].strip()}") from error
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    needed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    lost = {"it holds no": sorted(needed - stored), "the base model has no": sorted(stored - needed)}
    lost["the base model has no"] = [key for key in lost["the base model has no"] if ".lora_" in key]
    texts = [f"{text} {keys[0]} (one of {len(keys)})" for text, keys in lost.items() if keys]
    if texts:
        raise ValueError(f"{refused}: {'; '.join(texts)}")
    return model


def refuse_pickle(adapter: Path) -> None:
    """Check that an adapter's weights are safetensors; peft would take a pickle, whose loading can run code.

    Raises:
        ValueError: when there is no `adapter_model.safetensors` in the directory.
    """
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{adapter} holds no adapter_model.safetensors. Other files of weights, such as adapter_model.bin, are "
            "pickles and are not loaded: ask for the adapter in safetensors, or convert it where you trust it."
        )


def fetch_adapter(source: str, hub: dict) -> Path | None:
    """The directory of an adapter, fetched at one commit if it lies on the Hub; None when the source is a model.

    What was fetched before is found without the Hub too.
    """
    config = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if config is None:
        return None
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=FILES, **hub))
