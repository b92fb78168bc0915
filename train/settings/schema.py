"""Every setting of a run but those of `lrsa` and `data`, which bring their own: type, default, bounds and meaning.

`TrainSettings` is made from TRL's `SFTConfig`, field by field, so that names, types and defaults are TRL's own.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, create_model
from pydantic.fields import FieldInfo
from trl import SFTConfig

from data.settings import DataSettings
from lrsa import LRSAConfig
from lrsa.evaluation.suite import TASKS
from train.settings.model import LoraSettings, ModelSettings, Section

Ratio = Annotated[float, Field(gt=0, le=1)]
WHOLE_SUITE = "long_context"
SuiteTask = Literal[(WHOLE_SUITE, *TASKS)]


class ObjectiveSettings(Section):
    """The loss of a training step. The dense control is trained with cross-entropy alone."""

    cross_entropy: float = Field(
        1.0,
        ge=0,
        description="Weight of the cross-entropy on the trained tokens: the answers of "
        "qa, chat and synthetic rows, all tokens of text.",
    )
    distillation: float = Field(
        0.0, ge=0, description="Weight of KL(teacher || student) on the trained tokens; the teacher is the base model "
        "with its full cache.",
    )  # fmt: skip
    distillation_temperature: float = Field(
        1.0, gt=0, description="Temperature of both distributions of the distillation."
    )
    selection: float | None = Field(
        None, ge=0, description="Weight of the selection loss: LRSA's scores of each window are trained towards what "
        "later tokens take from there, their attention with the full cache times the norm of the values. Default "
        "1.5; 0 for data.kind: text.",
    )  # fmt: skip
    selection_temperature: float = Field(
        20.0,
        gt=0,
        description="Factor by which LRSA's scores are multiplied before the "
        "softmax of the selection loss: more is sharper.",
    )
    selection_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Layers with a selection loss; all compressed layers when not set."
    )
    selection_queries: int = Field(
        256, ge=1, description="Maximum number of query tokens per document in the selection loss, evenly spaced."
    )
    keep_ratios: list[Ratio] | None = Field(
        None, description="Keep ratios (top_k / lag_size) to train with, so that one adapter serves them all; that of "
        "lrsa.top_k must be one of them. When not set, 1 (the full cache) and that of lrsa.top_k.",
    )  # fmt: skip
    schedule: Literal["draw", "shrink"] = Field(
        "draw", description="draw: keep_ratios in random order, each once before any comes again; shrink: use them "
        "in order, an equal number of steps each.",
    )  # fmt: skip


class ParallelSettings(Section):
    """How the processes of a run divide the work beyond DeepSpeed's ZeRO, which `train.deepspeed` describes."""

    not_here: ClassVar[dict[str, str]] = {
        "cp_size": "ring context parallelism knows only causal masks, so that nothing would be compressed; use sp_size",
        "tp_size": "tensor parallelism is not tested with LoRA; use ZeRO-3 (train.deepspeed) and sp_size",
    }
    sp_size: int = Field(
        1, ge=1, description="GPUs that share every row (sequence parallelism, Ulysses), for rows too long for "
        "one; groups of that many are data-parallel. Needs train.deepspeed.",
    )  # fmt: skip


class EvalSettings(Section):
    """What is measured after training, on the rows that `data` held out."""

    enabled: bool = Field(
        True,
        description="Evaluate base and adapter after training; for the held-out loss on the way, with the full and the "
        "trained cache, set train.eval_strategy and train.eval_steps.",
    )
    keep_ratios: list[Ratio] = Field(
        [0.5, 0.25, 0.125],
        description="Keep ratios (top_k / lag_size) to evaluate, beside the full cache and that of lrsa.top_k.",
    )
    rows: int | None = Field(None, ge=1, description="Maximum number of evaluation rows; all when not set.")
    metric: Literal["generation", "loss", "both"] = Field(
        "both", description="generation: write answers and score them; loss: only read the right ones (answer loss and "
        "token accuracy), many times faster; both. Not used by text, which is always read.",
    )  # fmt: skip
    batch_size: int = Field(8, ge=1, description="Rows per batch.")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum length of a generated answer; when not set, that of the longest correct answer and "
        "one token. Not used by text, whose loss is measured.",
    )
    suite: list[SuiteTask] | None = Field(
        None, description="Tasks of the long-context suite to measure after training too; [long_context] is all of "
        "them. Hours on a large model.",
    )  # fmt: skip
    suite_lengths: list[Annotated[int, Field(ge=64)]] | None = Field(
        None,
        description="Tokens per row of the suite; when not set, four lengths up to the model's, each twice the last.",
    )
    suite_depths: int = Field(5, ge=1, description="Places in the text at which the suite hides a fact.")
    suite_rows: int = Field(4, ge=1, description="Rows of the suite for each length and depth.")
    control: bool = Field(
        False,
        description="Also train a control, a LoRA with dense attention and cross-entropy on the same data, seed "
        "and steps, into control/ of the run, and evaluate both. Twice the time.",
    )


class TrainerSection(Section):
    """The `train` section: the fields of TRL's `SFTConfig`, apart from those that other sections own."""

    not_here: ClassVar[dict[str, str]] = {
        "model_init_kwargs": "the model is described in section model",
        "trust_remote_code": "set model.trust_remote_code",
        "chat_template_path": "set model.chat_template",
        "truncation_mode": "rows are never cut; set data.context_length",
        "padding_free": "set packing: true",
        "parallelism_config": "set parallel.sp_size",
        "local_rank": "the launcher passes it",
        "do_train": "launch/train.py always trains",
        **dict.fromkeys(("do_eval", "do_predict"), "set eval.enabled"),
        **dict.fromkeys(("fsdp", "fsdp_config"), "use train.deepspeed"),
        **dict.fromkeys(("eos_token", "pad_token", "dataset_kwargs"), "rows come tokenized from section data"),
        **dict.fromkeys(
            ("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object"),
            "no metrics are computed from predictions; section eval says what is measured",
        ),
        "length_column_name": "rows have no such column; set train_sampling_strategy",
        "dataset_text_field": "rows come tokenized from section data; set data.columns",
        **dict.fromkeys(
            ("completion_only_loss", "assistant_only_loss"), "section data decides which tokens are trained"
        ),
        **dict.fromkeys(
            ("push_to_hub", *(f.name for f in dataclasses.fields(SFTConfig) if f.name.startswith("hub_"))),
            "launch/publish.py sends a finished run, checked and without local paths",
        ),
    }

    def given(self) -> dict[str, Any]:
        """What the configuration and our defaults set; the rest is left to SFTConfig itself."""
        return self.model_dump(exclude_unset=True)


def _max_steps(steps: int) -> int:
    if steps < 1 and steps != -1:
        raise ValueError(f"must be at least 1, or -1 to go by num_train_epochs, got {steps}")
    return steps


# Bounds of values that SFTConfig takes but that fail late or mean nothing.
BOUNDS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Field(ge=1)),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length"), Field(ge=1)),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "seed"), Field(ge=0)),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "logging_steps", "save_steps", "eval_steps"), Field(gt=0)),
    "max_steps": AfterValidator(_max_steps),
}
# Where our default, choices or meaning differ from TRL's: type, default, meaning. What is None depends on the machine
# or on another section, and is filled in by `with_defaults`.
OURS = {
    "output_dir": (str | None, None, "Directory of the run. Default runs/NAME-OF-THE-CONFIGURATION."),
    "max_length": (int | None, None, "Length of packed rows; default and minimum are data.context_length. Not used "
    "without packing."),
    "use_cpu": (bool | None, None, "Train on the CPU. Default true without a GPU."),
    "bf16": (bool | None, None, "bfloat16 mixed precision. Default true on a GPU that supports it, without fp16."),
    "activation_checkpointing": (bool | None, None, "Recompute activations in the backward pass instead of keeping "
                                 "them. Default true on a GPU."),
    "gradient_checkpointing": (bool | None, None, "Older name of activation_checkpointing."),
    "deepspeed": (dict | str | None, None, "DeepSpeed configuration: a JSON file, also looked up in configs/, or a "
    "mapping."),
    "resume_from_checkpoint": (Literal["auto"] | None, None, "auto: the same as --resume."),
    "packing_strategy": (Literal["bfd", "bfd_split"], "bfd", "How rows are packed: best-fit decreasing, without or "
                         "with splitting rows that are too long. TRL's wrapped would cut rows in the middle."),
}  # fmt: skip


def _typed(hint: Any, choices: typing.Iterable | None = None) -> Any:
    """A type hint of SFTConfig in which closed lists of texts (enums, `choices`) are Literals, and whole numbers stay
    whole where a float is expected."""
    if choices:
        literal = Literal[tuple(choices)]
        return literal | None if types.NoneType in typing.get_args(hint) else literal
    if isinstance(hint, enum.EnumMeta):
        return Literal[tuple(str(member.value) for member in hint)]
    if hint is float:
        return Annotated[float, AfterValidator(lambda x: int(x) if x.is_integer() else x)]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        closed = any(isinstance(part, enum.EnumMeta) for part in parts)
        return typing.Union[tuple(_typed(part) for part in parts if not (closed and part is str))]  # noqa: UP007
    return list[_typed(parts[0])] if typing.get_origin(hint) is list else hint


def _trainer_field(field: dataclasses.Field, hint: Any) -> tuple[Any, FieldInfo]:
    meaning = " ".join((field.metadata.get("help") or "").split())
    hint, default = _typed(hint, field.metadata.get("choices")), {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        default = {"default_factory": field.default_factory}
    if field.name in OURS:
        hint, default["default"], meaning = OURS[field.name]
    if field.name in BOUNDS:
        hint = Annotated[hint, BOUNDS[field.name]]
    return hint, Field(**default, description=meaning)


def _trainer_fields() -> dict[str, tuple[Any, FieldInfo]]:
    hints = typing.get_type_hints(SFTConfig)
    fields = [field for field in dataclasses.fields(SFTConfig) if field.name not in TrainerSection.not_here]
    return {field.name: _trainer_field(field, hints[field.name]) for field in fields}


MAX_MINUTES = """Minutes of training, all starts of a run together; a learning rate that falls does so with the time.
max_steps or num_train_epochs may end it earlier. The control takes as many steps."""
PATIENCE = """Stop when the held-out loss with the trained cache has not fallen for so many evaluations
(train.eval_strategy), and keep the best checkpoint (load_best_model_at_end)."""
TrainSettings = create_model(
    "TrainSettings",
    __base__=TrainerSection,
    max_minutes=(float | None, Field(None, gt=0, description=" ".join(MAX_MINUTES.split()))),
    early_stopping_patience=(int | None, Field(None, ge=1, description=" ".join(PATIENCE.split()))),
    **_trainer_fields(),
)

# Meanings of the fields of LRSAConfig, which checks itself.
LRSA = {
    "sink_size": "Number of first tokens of a row that are always kept.",
    "lag_size": "Tokens per window; a window is scored against the window after it, so the last one to two stay whole.",
    "top_k": "Tokens kept of each older window, per KV head; top_k / lag_size is the keep ratio. top_k equal to "
    "lag_size keeps everything: dense attention.",
    "value_weight": "Weight of the values' score against the keys' score (LagKV's score_v_ratio).",
    "skip_layers": "Indices of layers that stay dense, in training and in the cache.",
}
SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "lrsa": LRSAConfig,
    "lora": LoraSettings,
    "objective": ObjectiveSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "parallel": ParallelSettings,
    "eval": EvalSettings,
}
