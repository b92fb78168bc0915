"""What is trained: the settings of the base model and of its adapter."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lrsa.attention.api import IMPLEMENTATIONS
from lrsa.base_loading import BaseLoading

Attention = Literal[("auto", *IMPLEMENTATIONS)]


class Section(BaseModel):
    """One section of a configuration; `not_here` says of names that people try what to use instead."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    not_here: ClassVar[dict[str, str]] = {}


def _rope_type(value: str) -> str:
    if value == "dynamic":
        raise ValueError(
            "cannot be dynamic: its frequencies change with the length that was read, so that the keys in the cache, "
            "whose scores decide what is kept, would be turned otherwise than in training; use yarn or linear"
        )
    if value not in ("yarn", "linear"):
        raise ValueError(f"must be yarn or linear, got {value!r}")
    return value


class RopeScaling(Section):
    """How rotary positions are scaled beyond those that the model was trained on."""

    rope_type: Annotated[str, AfterValidator(_rope_type)] = Field(description="yarn or linear.")
    factor: float = Field(gt=1, description="By how much the model's positions are multiplied.")


class ModelSettings(Section):
    """The base model and how it is loaded."""

    name_or_path: str = Field(min_length=1, description="Directory or Hub id of a causal language model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen base weights; auto: bfloat16 under train.bf16, float16 under train.fp16, "
        "else float32.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="Load the linear layers' weights in 4 bits (nf4) or 8 (int8), by bitsandbytes, computing in "
        "dtype. Not under ZeRO-3.",
    )
    double_quantization: bool = Field(True, description="Quantise the scales of nf4 as well.")
    gguf_file: str | None = Field(
        None, description="A GGUF file in that directory or repository, to load the model from, dequantised."
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Scale rotary positions for rows beyond the model's own, such as {rope_type: yarn, factor: 4}; "
        "rope_type is yarn or linear. Stored with the adapter, and set again by lrsa.load.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code from the model's repository.")
    chat_template: str | None = Field(
        None,
        description="Jinja file that replaces the tokenizer's chat template; the word none: prompts are plain text. "
        "null: the tokenizer's own.",
    )
    attention: Attention = Field(
        "auto",
        description="Implementation of LRSA attention in training (docs/performance.md); auto: native on a CPU "
        "with a C++ compiler, else tiled.",
    )

    @model_validator(mode="after")
    def _one_quantisation(self):
        if self.quantization and self.gguf_file:
            raise ValueError("quantization cannot be used with gguf_file: save that model as a folder first")
        return self

    @property
    def weights(self) -> str:
        """The type of the base weights, for people."""
        return f"{self.quantization}, computing in {self.dtype}" if self.quantization else self.dtype

    @property
    def loading(self) -> BaseLoading:
        """What `lrsa.load` has to know of it."""
        return BaseLoading(self.gguf_file, self.rope_scaling and self.rope_scaling.model_dump())


# What PEFT can start from by taking it out of the base weights: with the adapter off, the model is no longer the base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _init_lora_weights(value: bool | str) -> bool | str:
    if isinstance(value, str) and value.startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"cannot be {value}: it takes its start out of the base weights, so that with the adapter off the model is "
            "no longer the base, which the objective's teacher and the evaluation need; use true or gaussian"
        )
    if value not in (True, "gaussian"):
        raise ValueError(f"must be true or gaussian, got {value!r}: the adapter has to begin without effect")
    return value


class LoraSettings(Section):
    """The adapter, under PEFT's own names. No `bias`: a trained bias stays when the adapter is switched off, so the
    base model could not be measured beside its adapter."""

    init_from: str | None = Field(
        None,
        description="Directory or Hub id of an adapter to continue, for the same or another compression. Its r, "
        "lora_alpha, target_modules, use_rslora, use_dora and modules_to_save count: leave them out.",
    )
    r: int = Field(16, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(32, gt=0, description="The adapter's output is scaled by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training only.")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear (every linear layer except the head), or names such as [q_proj, v_proj]."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead.")
    use_dora: bool = Field(False, description="Train every weight's magnitude and direction apart (DoRA); slower.")
    modules_to_save: list[str] | None = Field(
        None,
        description="Modules trained whole beside the adapter and saved with it, such as [lm_head]; not under ZeRO-3, "
        "and not embeddings that the head shares.",
    )
    init_lora_weights: Annotated[bool | str, AfterValidator(_init_lora_weights)] = Field(
        True, description="How the adapter begins: true (PEFT's default) or gaussian."
    )
