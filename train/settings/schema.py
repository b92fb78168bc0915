"""The sections of a run that belong to `train/`: base model, LoRA and evaluation. `lrsa` and `data` bring their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSettings(BaseModel):
    """Which base model is tuned, and how it is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name_or_path: str = Field(min_length=1, description="directory or Hub id of a causal language model")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the frozen weights; auto follows train.bf16 / train.fp16, else float32"
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings")
    chat_template: str | None = Field(
        None, description="Jinja file that replaces the tokenizer's chat template, or none for plain text"
    )


class LoraSettings(BaseModel):
    """The adapter, under PEFT's own names. No `bias`: a trained bias stays when the adapter is switched off, so the
    base model could not be measured beside its adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(16, ge=1, description="rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="the adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter, in training only")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear (every linear layer except the head), or names such as [q_proj, v_proj]"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")


class ObjectiveSettings(BaseModel):
    """What a training step learns from. The dense control learns from cross-entropy alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cross_entropy: float = Field(1.0, ge=0, description="weight of the loss on the trained tokens")
    distillation: float = Field(
        0.0, ge=0, description="weight of the divergence from the base model with its full cache, on the trained tokens"
    )
    distillation_temperature: float = Field(1.0, gt=0, description="softens both distributions before comparing them")
    selection: float | None = Field(
        None, ge=0, description="weight of teaching the scores to keep what the base model, with its full cache, "
        "looks at; when not set 1, for text 0",
    )  # fmt: skip
    selection_temperature: float = Field(20.0, gt=0, description="factor of the scores before their softmax")
    selection_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="layers whose scores are taught; all when not set"
    )
    selection_queries: int = Field(
        256, ge=1, description="tokens of a document whose attention is the target, at most, spread evenly over it"
    )
    keep_ratios: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="keep ratios to train with, so that one adapter serves them all; when not set the full "
        "cache (1) and that of lrsa.top_k",
    )  # fmt: skip
    schedule: Literal["draw", "shrink"] = Field(
        "draw", description="draw a keep ratio for every step, or go through keep_ratios in equal parts of the run"
    )

    @property
    def has_teacher(self) -> bool:
        """Whether the base model has to run beside the model that is trained."""
        return bool(self.distillation or self.selection)


# What other frameworks call by these names, and why it is not here.
NOT_PARALLEL = {
    "cp_size": "ring context parallelism replaces the attention by one that knows causal masks only, so that nothing "
    "would be compressed; use sp_size",
    "tp_size": "tensor parallelism has not been tried with LoRA here; use ZeRO-3 (train.deepspeed) and sp_size",
}


class ParallelSettings(BaseModel):
    """How the processes of a run divide the work beyond DeepSpeed's ZeRO, which `train.deepspeed` describes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sp_size: int = Field(
        1, ge=1, description="processes that share every row (Ulysses sequence parallelism); the rest take other rows"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: dict) -> dict:
        refused = [f"{name} cannot be set: {reason}" for name, reason in NOT_PARALLEL.items() if name in values]
        if refused:
            raise ValueError("; ".join(refused))
        return values


class EvalSettings(BaseModel):
    """What is measured after training, on the rows that `data` held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="evaluate after training")
    keep_ratios: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.5, 0.25, 0.125], description="shares of a window to keep; the full cache and the trained ratio always count"
    )
    rows: int | None = Field(None, ge=1, description="at most so many held-out rows; all of them when not set")
    batch_size: int = Field(8, ge=1, description="rows evaluated at a time")
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer; the task decides when not set")
    control: bool = Field(
        False, description="also train a dense LoRA with the same data, seed and steps, and evaluate it beside"
    )
