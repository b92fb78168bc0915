"""Settings that would be read by nothing, because another one is not what they need: refused, not ignored.

One that is switched off in so many words (`train.eval_strategy: no`, `objective.selection: 0`) may leave its details
where they are: that is how a run is tried without it. So may a setting that says no more than its default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from data.settings import SourceSettings, SyntheticSettings
from train.settings.errors import FieldPath
from train.settings.schema import EvalSettings, ModelSettings, ObjectiveSettings, TrainerSection

OFF = (None, False, 0, "no", "none", [])
READ = ("qa", "chat", "text")
# Of each section: settings, and the one that they need, with the values that will do; none given: whatever is not off.
NEEDS: dict[type, list[tuple[tuple[str, ...], str, tuple]]] = {
    SourceSettings: [
        (("name", "split", "eval_path", "eval_split", "columns"), "kind", READ),
        (("format", "prompt_template", "distractors", "shuffle_passages", "questions_per_row"), "kind", ("qa",)),
        (("train_on", "too_long"), "kind", ("chat",)),
        (("end_of_document", "join_documents"), "kind", ("text",)),
        (("synthetic",), "kind", ("synthetic",)),
    ],
    SyntheticSettings: [(("keys", "questions"), "task", ("key_value",))],
    ModelSettings: [(("double_quantization",), "quantization", ("nf4",))],
    ObjectiveSettings: [(("distillation_temperature",), "distillation", ())],
    TrainerSection: [
        (("eval_steps",), "eval_strategy", ("steps",)),
        (("eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps"), "eval_strategy", ()),
        (("bf16_full_eval", "fp16_full_eval", "prediction_loss_only"), "eval_strategy", ()),
        (("save_steps",), "save_strategy", ("steps",)),
        (("logging_steps",), "logging_strategy", ("steps",)),
        (("max_length", "packing_strategy"), "packing", ()),
        (("liger_kernel_config",), "use_liger_kernel", ()),
        (("run_name", "project"), "report_to", ()),
        (("dataloader_in_order", "dataloader_multiprocessing_context"), "dataloader_num_workers", ()),
    ],
    EvalSettings: [
        (("suite_lengths", "suite_depths", "suite_rows"), "suite", ()),
        (("max_new_tokens",), "metric", ("generation", "both")),
    ],
}  # fmt: skip


def without_effect(built: dict[str, Any]) -> dict[FieldPath, str]:
    """What is wrong with such settings, by their place; sections that are None have other problems."""
    sections = {name: values for name, values in built.items() if isinstance(values, BaseModel)}
    problems = dict(item for name, values in sections.items() for item in _within(values, (name,)))
    return problems | {path: text for path, text in _across(sections) if _is_moved(sections[path[0]], path[1])}


def _within(values: BaseModel, path: FieldPath) -> Iterator[tuple[FieldPath, str]]:
    for names, switch, enough in (need for kind in type(values).__mro__ for need in NEEDS.get(kind, ())):
        value = getattr(values, switch)
        off = value in OFF
        if (value in enough if enough else not off) or (off and switch in values.model_fields_set):
            continue
        where, is_now = ".".join(map(str, (*path, switch))), "null" if value is None else f"{value}".lower()
        needed = f": {' or '.join(enough)}" if enough else ""
        for name in filter(lambda name: _is_moved(values, name), names):
            yield (*path, name), f"has no effect without {where}{needed}, which is {is_now}: set that, or leave it out"
    for name in type(values).model_fields:
        value = getattr(values, name)
        listed = [((name, n), part) for n, part in enumerate(value)] if isinstance(value, list) else []
        for place, part in [((name,), value), *listed]:
            if isinstance(part, BaseModel):
                yield from _within(part, path + place)


def _across(sections: dict[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """The settings that another section leaves without effect."""
    model, lora, data, train, objective, evaluation = (
        sections.get(name) for name in ("model", "lora", "data", "train", "objective", "eval")
    )
    if data and all(source.kind == "text" for source in data.each().values()):
        read = ["metric"] if evaluation and evaluation.suite else []  # by the suite, whose passkeys can be generated
        for name in {"metric", "max_new_tokens"}.difference(read) if evaluation else ():
            yield ("eval", name), "has no effect with data.kind: text, whose loss is measured: leave it out"
        if objective and objective.selection is None:
            for name in ("selection_temperature", "selection_layers", "selection_queries"):
                yield ("objective", name), "has no effect with data.kind: text without objective.selection: set that"
    if train and data and data.streaming and train.train_sampling_strategy != "sequential":
        text = "has no effect with data.streaming, which keeps the order of the files: leave it out"
        yield ("train", "train_sampling_strategy"), text
    if model and model.name_or_path.startswith("/"):
        yield ("model", "revision"), f"has no effect with a directory ({model.name_or_path}): leave it out"
    if lora and lora.init_from:
        yield ("lora", "init_lora_weights"), f"has no effect with lora.init_from {lora.init_from}: leave it out"


def _is_moved(values: BaseModel, name: str) -> bool:
    field = type(values).model_fields[name]
    return getattr(values, name) != field.get_default(call_default_factory=True)
