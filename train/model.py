"""Base model and tokenizer, loaded as the `model` section says and checked against the rows."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    AwqConfig,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    GPTQConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsa.hf.layers import is_recurrent
from train.adapter import some
from train.failures import is_out_of_memory
from train.settings.errors import Problem, SettingsError
from train.settings.schema import ModelSettings

# Their layers never see where documents begin (docs/models.md): packed ones would see each other, with LRSA or without.
NO_DOCUMENTS = (
    *("granitemoehybrid", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    *("xlm-roberta-xl", "xmod", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm_ocr"),
    *("paddleocr_vl", "cosmos3_edge", "glmga", "hunyuan_vl", "kosmos-2.5"),
)


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
    quantization = _quantization(settings) or _trainable(settings)
    options = {} if quantization is None else {"quantization_config": quantization}
    # it says for every layer of every pass that int8 computes in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # of a base that is stored quantised: that only the way to load it is taken from here, which is meant
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = _load(AutoModelForCausalLM, settings, dtype=dtype, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU an evaluation would pack the weights anew, for good, in a way that gradients do not pass.
            module.support_avx512bf16_for_cpu = False
    return model


def is_packed(model: PreTrainedModel) -> bool:
    """Whether bitsandbytes holds the weights, by `model.quantization` or because they are stored so."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def check_weights(settings: ModelSettings) -> None:
    """Compare the model's files with its configuration; no weight is kept, so it costs little.

    Raises:
        SettingsError: when the weights are damaged or of another shape, some are missing, or a quantised model's
            package is not installed.
    """
    stored, ours = getattr(load_config(settings), "quantization_config", None), _quantization(settings)
    if stored is not None and ours is not None:
        text = f"cannot be {settings.quantization}: {settings.name_or_path} is stored quantised already; leave it out"
        raise SettingsError([Problem("", "model.quantization", text)])
    if stored is not None or ours is not None:
        field = f"model.name_or_path {settings.name_or_path}" if ours is None else "model.quantization"
        try:
            AutoHfQuantizer.from_config(stored or ours).validate_environment(device_map=None)
        except (ImportError, RuntimeError) as error:
            raise SettingsError([Problem("", field, str(error))]) from error
    if stored is not None or settings.gguf_file:  # needs the device that they are made for, or is read as a whole
        return
    options = {"device_map": "meta", "output_loading_info": True}
    info = _load(AutoModelForCausalLM, settings, ignore_mismatched_sizes=True, **options)[1]
    texts = [f"no weights for {some(names)}" for names in [sorted(info["missing_keys"])] if names]
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


def embedding_count(model: PreTrainedModel) -> int:
    """Number of input embeddings, also where an adapter is around them."""
    modules = model.get_input_embeddings().modules()
    return next(module.num_embeddings for module in modules if hasattr(module, "num_embeddings"))


def token_problems(tokenizer: PreTrainedTokenizerBase, highest: int, model: PreTrainedModel) -> list[Problem]:
    """Tokens that the model has no embedding for, of those in the rows (`highest` is their largest id) and padding."""
    token, count = max(highest, tokenizer.pad_token_id), embedding_count(model)
    if token < count:
        return []
    text = (
        f"token {tokenizer.convert_ids_to_tokens(token)} has id {token}, but the model has {count} embeddings: use the "
        "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save the model"
    )
    return [Problem("", "model.name_or_path", text)]


def packing_problems(model: PreTrainedModel) -> list[Problem]:
    """Models that cannot tell packed documents apart."""
    kind = model.config.model_type
    if kind not in NO_DOCUMENTS and not is_recurrent(model.config.get_text_config()):
        return []
    text = f"cannot be used with {kind}: its layers do not see where a document begins; set it to false"
    return [Problem("", "train.packing", text)]


def _quantization(settings: ModelSettings) -> BitsAndBytesConfig | None:
    if settings.quantization is None:
        return None
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype) if settings.dtype != "auto" else None,
    )


def _trainable(settings: ModelSettings) -> QuantizationConfigMixin | None:
    """How a base that is stored quantised is loaded so that gradients pass, where its package would not choose that."""
    stored = getattr(load_config(settings), "quantization_config", None)
    method = getattr(stored, "quant_method", None) or (stored or {}).get("quant_method")
    match method:
        case "compressed-tensors":  # else its first forward would unpack it, of the whole model alone
            return CompressedTensorsConfig(dequantize=True)
        case "gptq":  # of a given one only the backend is taken
            return GPTQConfig(bits=4, backend="auto_trainable")
        case "awq":
            return AwqConfig(backend="auto_trainable")
    return None


def _load(auto_class: type, settings: ModelSettings, **options):
    name, hub = settings.name_or_path, {"revision": settings.revision or "main"}
    hub["trust_remote_code"] = settings.trust_remote_code
    try:
        if auto_class is not AutoModelForCausalLM:
            return auto_class.from_pretrained(name, **hub, **settings.loading.files(), **options)
        # Other weights than safetensors are pickles: code, as that which trust_remote_code allows.
        safe = {"use_safetensors": not settings.trust_remote_code or None}
        loaded = auto_class.from_pretrained(name, **hub, **(safe | options | settings.loading.options(name, **hub)))
        settings.loading.check(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
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
