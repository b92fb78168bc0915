"""Fills in what a configuration left open, for the machine it runs on, so that the stored settings say everything."""

from __future__ import annotations

import dataclasses

from train.settings.load import RunSettings
from train.settings.schema import ObjectiveSettings, TrainSettings

# TRL's own defaults that a stored run names nevertheless.
STORED = ("packing", "report_to", "logging_steps", "seed")

SELECTION = 1.5  # weight of the selection loss


def with_defaults(settings: RunSettings, *, use_cpu: bool | None = None) -> RunSettings:
    """The settings with an output directory, precision, device and logging decided.

    Args:
        use_cpu: whether the run will train on a CPU, for one that is planned for another machine; otherwise a GPU is
            used where there is one.

    Raises:
        SettingsError: when the adapter of `lora.init_from` cannot be continued.
    """
    import torch

    from train.adapter import continued

    elsewhere = use_cpu is not None
    given = settings.train.given()
    if given.get("use_cpu") is None:
        given["use_cpu"] = use_cpu if elsewhere else not torch.cuda.is_available()
    on_gpu = not given["use_cpu"]
    if given.get("bf16") is None:
        given["bf16"] = on_gpu and not settings.train.fp16 and (elsewhere or torch.cuda.is_bf16_supported())
    older = given.pop("gradient_checkpointing", None)  # transformers warns that this name will go away
    if given.get("activation_checkpointing") is None:
        given["activation_checkpointing"] = on_gpu if older is None else older
    ours = {"output_dir": f"runs/{settings.file.stem}"}
    ours |= {"max_length": settings.data.context_length} if given.get("packing") else {}
    given |= {name: value for name, value in ours.items() if given.get(name) is None}
    if settings.train.early_stopping_patience:
        given.setdefault("load_best_model_at_end", True)
    train = TrainSettings(**{name: getattr(settings.train, name) for name in STORED} | given)
    model = settings.model
    if model.dtype == "auto":
        precise = "bfloat16" if train.bf16 else "float16" if train.fp16 else "float32"
        model = model.model_copy(update={"dtype": precise})
    lora = continued(settings.lora)
    return dataclasses.replace(settings, model=model, lora=lora, train=train, objective=_objective(settings))


def _objective(settings: RunSettings) -> ObjectiveSettings:
    """What the experiments in RESULTS.md support: where few tokens are trained, the selection loss teaches which ones
    will be needed; and steps with the full cache keep its score."""
    answers = any(source.kind != "text" for source in settings.data.each().values())
    best = {"selection": SELECTION if answers else 0.0, "keep_ratios": [1.0, settings.lrsa.keep_ratio]}
    unset = {name: value for name, value in best.items() if getattr(settings.objective, name) is None}
    return settings.objective.model_copy(update=unset)
