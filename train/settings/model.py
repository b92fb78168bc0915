"""What is trained: the settings of the base model and of its adapter."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lrsa.attention.api import IMPLEMENTATIONS

Attention = Literal[("auto", *IMPLEMENTATIONS)]


class Section(BaseModel):
    """One section of a configuration; `not_here` says of names that people try what to use instead."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    not_here: ClassVar[dict[str, str]] = {}


class ModelSettings(Section):
    """The base model and how it is loaded."""

    name_or_path: str = Field(min_length=1, description="Directory or Hub id of a causal language model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen base weights; auto: bfloat16 under train.bf16, float16 under train.fp16, "
        "else float32.",
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
