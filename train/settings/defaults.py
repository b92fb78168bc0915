"""Fills in what a configuration left open, for the machine it runs on, so that the stored settings say everything."""

from __future__ import annotations

import dataclasses

from train.settings.load import RunSettings
from train.settings.schema import ObjectiveSettings


def with_defaults(settings: RunSettings) -> RunSettings:
    """The settings with an output directory, precision, device and logging decided."""
    import torch

    train = dict(settings.train)
    train.setdefault("output_dir", f"runs/{settings.file.stem}")
    train.setdefault("use_cpu", not torch.cuda.is_available())
    on_gpu = not train["use_cpu"]
    train.setdefault("bf16", on_gpu and not train.get("fp16") and torch.cuda.is_bf16_supported())
    _default_checkpointing(train, on_gpu)
    train.setdefault("max_length", settings.data.context_length)
    train.setdefault("packing", False)
    train.setdefault("report_to", "none")
    train.setdefault("logging_steps", 10)
    train.setdefault("seed", 42)
    model = settings.model
    if model.dtype == "auto":
        precise = "bfloat16" if train["bf16"] else "float16" if train.get("fp16") else "float32"
        model = model.model_copy(update={"dtype": precise})
    return dataclasses.replace(settings, model=model, train=train, objective=_objective(settings))


def _objective(settings: RunSettings) -> ObjectiveSettings:
    """What the experiments in RESULTS.md support: where few tokens are trained, the selection has to be taught which
    ones will be asked for; and steps with the full cache keep its score."""
    best = {"selection": float(settings.data.kind != "text"), "keep_ratios": [1.0, settings.lrsa.keep_ratio]}
    open_ = {name: value for name, value in best.items() if getattr(settings.objective, name) is None}
    return settings.objective.model_copy(update=open_)


def _default_checkpointing(train: dict, on_gpu: bool) -> None:
    """Recompute activations on a GPU, where memory is short; `gradient_checkpointing` is the setting's older name."""
    from trl import SFTConfig

    newer, older = "activation_checkpointing", "gradient_checkpointing"
    name = newer if any(field.name == newer for field in dataclasses.fields(SFTConfig)) else older
    if newer not in train and older not in train:
        train[name] = on_gpu
    elif older in train and name == newer:
        # The older name makes transformers warn that it will go away.
        train.setdefault(newer, train[older])
        del train[older]
