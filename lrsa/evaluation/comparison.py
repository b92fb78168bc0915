"""Every model at every cache setting on the same rows: what compression costs, and what training gives back."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import numpy
import torch
import transformers

import lrsa
from lrsa.config import LRSAConfig
from lrsa.evaluation.extra import extra
from lrsa.evaluation.measure.cost import LayerCost, prefill_cost
from lrsa.evaluation.measure.generation import check_rows, generate_answers, longest_answer
from lrsa.evaluation.measure.normal_forms import rules_of
from lrsa.evaluation.measure.perplexity import evaluate_loss, perplexity_of
from lrsa.evaluation.measure.question_answering import score_question_answering
from lrsa.evaluation.measure.retrieval import score_retrieval
from lrsa.evaluation.measure.state import Variant, causal_lm, with_adapter, with_attention
from lrsa.evaluation.results import Cell, Results, Setting

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TASKS = ("retrieval", "qa", "loss")


def compare(
    models: dict[str, PreTrainedModel | PeftModel | Variant],
    tokenizer,
    rows: Sequence[dict],
    task: Literal["retrieval", "qa", "loss"],
    config: LRSAConfig,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125),
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Results:
    """Measure every model with the full cache and with compressed caches.

    Args:
        models: name -> model. A model is measured as it stands; `Variant(peft_model, "adapter name")` switches an
            adapter on first and `Variant(peft_model, None)` all of them off, so that many models share one set of
            weights. Reports compare the last model with the others.
        tokenizer: decodes answers; not used for `"loss"`, where it may be `None`.
        rows: as `generate_answers` takes them, or `evaluate_loss` for `"loss"`.
        task: `"retrieval"` and `"qa"` generate answers; `"loss"` reads documents.
        config: the settings of the training; its own keep ratio is always measured too.
        keep_ratios: shares of a window's tokens to keep, above 0 and at most 1; `top_k` is the nearest whole number.
            What amounts to 1 is left out, being the full cache.
        batch_size, max_new_tokens: as `generate_answers` and `evaluate_loss` take them.
        seed: of the bootstrap; generation is greedy and needs none.
        progress: show a progress bar, on a terminal.

    Returns:
        `Results`, with `.score(model, setting)` and `.difference(a, b, setting)`; `print_report` and `save_report` of
        this package show and write them.

    Raises:
        ValueError: when task, ratios, rows or models cannot be used; said before anything is run.
        ImportError: when a progress bar is wanted and the extra `lrsa[evaluation]` is not installed.
    """
    tqdm = extra("tqdm.auto").tqdm if progress else None
    _check(models, tokenizer, rows, task)
    if task != "loss" and max_new_tokens is None:
        max_new_tokens = longest_answer(tokenizer, rows)
    first = next(iter(models.values()))
    read = [row["input_ids"] if task == "loss" else row["input_ids"][: row["prompt_length"]] for row in rows]
    settings = [Setting(setting, _cost(first, setting, read)) for setting in _settings(config, keep_ratios)]
    expected = None if task == "loss" else [row["answers"] for row in rows]
    details = _details(first, task, batch_size, max_new_tokens, seed, expected)
    cells: dict[str, dict[str, Cell]] = {name: {} for name in models}
    total = len(models) * len(settings) * len(rows)
    with tqdm(total=total, unit="row", disable=None) if progress else nullcontext() as bar:  # None: off a terminal
        for name, model in models.items():
            for setting in settings:
                if bar is not None:
                    bar.set_description(f"evaluating {name}, {setting.name}")
                start = time.perf_counter()
                with _adapter(model), with_attention(_plain(model), setting.config):
                    scores, answers = _measure(
                        task, _plain(model), tokenizer, rows, batch_size, max_new_tokens, bar and bar.update, seed
                    )
                cells[name][setting.name] = Cell(scores, answers, time.perf_counter() - start)
    return Results(task, config, settings, _describe(read, config), details, cells, expected)


def _measure(task, model, tokenizer, rows, batch_size, max_new_tokens, progress, seed):
    """Scores by metric, the headline first, and the generated answers."""
    if task == "loss":
        loss = evaluate_loss(model, rows, batch_size=batch_size, progress=progress, seed=seed)
        return {"loss": loss, "perplexity": perplexity_of(loss)}, None
    answers = generate_answers(
        model, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    if task == "retrieval":
        return {"accuracy": score_retrieval(answers, rows, seed)}, answers
    return score_question_answering(answers, rows, seed), answers


def _settings(config: LRSAConfig, keep_ratios: Sequence[float]) -> list[LRSAConfig | None]:
    """The full cache, then the trained and the given keep ratios, falling."""
    found = {config.top_k: config} | {c.top_k: c for c in map(config.with_keep_ratio, keep_ratios)}
    return [None, *(found[top_k] for top_k in sorted(found, reverse=True) if top_k < config.lag_size)]


def _cost(model, setting: LRSAConfig | None, read: list[list[int]]) -> list[LayerCost]:
    """Cost of the cache for the longest row. Depends on lengths and shapes only, so any one model will do."""
    with _adapter(model), with_attention(_plain(model), setting):
        return prefill_cost(_plain(model), max(read, key=len))


def _plain(model):
    return model.model if isinstance(model, Variant) else model


def _adapter(model):
    return with_adapter(model) if isinstance(model, Variant) else nullcontext()


def _describe(read: list[list[int]], config: LRSAConfig) -> dict:
    """Number and lengths of what the model reads: prompts, or whole documents."""
    lengths = list(map(len, read))
    compressed = sum(length > config.dense_length for length in lengths) / len(lengths)
    return {
        "n": len(read), "shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths),
        "compressed_share": compressed,
    }  # fmt: skip


def _details(model, task: str, batch_size: int, max_new_tokens: int | None, seed: int, expected) -> dict:
    lm = causal_lm(_plain(model))
    versions = {
        "lrsa": lrsa.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": numpy.__version__, "python": platform.python_version(),
    }  # fmt: skip
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type
    rules = {"comparison": rules_of(answer for answers in expected for answer in answers)} if task == "qa" else {}
    return rules | {
        "decoding": None if task == "loss" else "greedy", "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        "seed": seed, "device": device, "dtype": str(lm.dtype).removeprefix("torch."), "versions": versions,
    }  # fmt: skip


def _check(models, tokenizer, rows, task) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if task != "loss" and tokenizer is None:
        raise ValueError(f"task {task!r} needs a tokenizer, to decode the answers.")
    if not models:
        raise ValueError("models is empty: give at least one model to evaluate.")
    for name, model in models.items():
        known = list(model.model.peft_config) if isinstance(model, Variant) else []
        if isinstance(model, Variant) and model.adapter is not None and model.adapter not in known:
            raise ValueError(f"model {name!r} has no adapter {model.adapter!r}: it has {', '.join(known)}.")
    check_rows(rows, ("input_ids",) if task == "loss" else ("input_ids", "prompt_length", "answers"))
