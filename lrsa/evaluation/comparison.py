"""Every model at every cache setting on the same rows: what compression costs, and what training gives back."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy
import torch
import transformers

import lrsa
from lrsa.config import LRSAConfig
from lrsa.evaluation.measure.cost import LayerCost, kept_share, prefill_cost
from lrsa.evaluation.measure.generation import check_rows, generate_answers, longest_answer
from lrsa.evaluation.measure.normal_forms import rules_of
from lrsa.evaluation.measure.perplexity import perplexity_of, teacher_forced
from lrsa.evaluation.measure.question_answering import score_question_answering
from lrsa.evaluation.measure.retrieval import score_retrieval
from lrsa.evaluation.measure.state import Variant, causal_lm, with_adapter, with_attention
from lrsa.evaluation.progress import Progress
from lrsa.evaluation.results import Cell, Results, Setting
from lrsa.evaluation.score import Score

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TASKS = ("retrieval", "qa", "chat", "loss")
METRICS = ("generation", "loss", "both")


def compare(
    models: dict[str, PreTrainedModel | PeftModel | Variant],
    tokenizer,
    rows: Sequence[dict],
    task: Literal["retrieval", "qa", "chat", "loss"],
    config: LRSAConfig,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125),
    *,
    metric: Literal["generation", "loss", "both"] = "both",
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    score: Callable[[Sequence[str], Sequence[dict], int], dict[str, Score]] | None = None,
    edges: Sequence[int] = (),
    seed: int = 0,
    progress: bool = True,
) -> Results:
    """Measure every model with the full cache and with compressed caches.

    Args:
        models: name -> model. A model is measured as it stands; `Variant(peft_model, "adapter name")` switches an
            adapter on first and `Variant(peft_model, None)` all of them off, so that many models share one set of
            weights; `Variant(model, adapter, config)` also has a lag or a choice of tokens of its own. Reports compare
            the last model with the others.
        tokenizer: decodes answers; not used for `"loss"`, where it may be `None`.
        rows: as `generate_answers` takes them, or `evaluate_loss` for `"loss"`.
        task: `"retrieval"` and `"qa"` have answers; `"loss"` reads documents; `"chat"` reads chats, and generates the
            last answer of those rows that have `"answers"` to compare it with.
        config: the settings of the training; its own keep ratio is always measured too.
        keep_ratios: shares of a window's tokens to keep, above 0 and at most 1; `top_k` is the nearest whole number.
            What amounts to 1 is left out, being the full cache.
        metric: whether answers are generated and scored, or read as they should be (loss and token accuracy, many times
            faster), or both. Documents are only read.
        batch_size, max_new_tokens, edges: as `generate_answers` and `teacher_forced` take them.
        score: scores generated answers, given them, their rows and `seed`, in place of the task's own metrics.
        seed: of the bootstrap; generation is greedy and needs none.
        progress: print rows done, time left and the score so far on standard error.

    Returns:
        `Results`, with `.score(model, setting)` and `.difference(a, b, setting)`; `print_report` and `save_report` of
        this package show and write them.

    Raises:
        ValueError: when task, ratios, rows or models cannot be used; said before anything is run.
    """
    _check(models, tokenizer, rows, task, metric)
    work = _Work(task, metric, tokenizer, rows, batch_size, max_new_tokens, score or SCORES.get(task), edges, seed)
    read = [row["input_ids"] if work.reads else row["input_ids"][: row["prompt_length"]] for row in rows]
    lengths, first = list(map(len, read)), next(iter(models.values()))
    settings = [Setting(setting, _cost(first, setting, read)) for setting in _settings(config, keep_ratios)]
    cells = _cells(work, models, settings, lengths, silent=not progress)
    expected = [row["answers"] for row in work.asked] if "generation" in work.passes else None
    return Results(task, config, settings, _describe(read, config), _details(models, work), cells, expected)


def _cells(
    work: _Work, models: dict, settings: list[Setting], lengths: list[int], silent: bool
) -> dict[str, dict[str, Cell]]:
    """Every model at every setting; the full cache once for one set of weights, whatever would be kept of it."""
    jobs = {(name, setting.name): _job(models[name], setting) for name in models for setting in settings}
    bar = Progress(len(set(jobs.values())) * work.size, silent=silent)
    done: dict[tuple, Cell] = {}
    for (name, setting), job in jobs.items():
        if job not in done:
            model, start = models[name], time.perf_counter()
            with _adapter(model), with_attention(_plain(model), job[-1]):
                scores, answers = work.measure(_plain(model), bar, f"{name}, {setting}")
            done[job] = Cell(scores, answers, time.perf_counter() - start, kept_share(_plain(model), job[-1], lengths))
    return {name: {setting.name: done[jobs[name, setting.name]] for setting in settings} for name in models}


@dataclass(frozen=True)
class _Work:
    """What is measured on every model at every setting."""

    task: str
    metric: str
    tokenizer: object
    rows: Sequence[dict]
    batch_size: int
    max_new_tokens: int | None
    score: Callable | None
    edges: Sequence[int]
    seed: int

    @property
    def passes(self) -> tuple[str, ...]:
        """`"generation"`, `"loss"`, or both, the headline first."""
        if self.task == "loss" or not self.asked:
            return ("loss",)
        if self.task == "chat":
            return ("loss",) if self.metric == "loss" else ("loss", "generation")
        return ("generation", "loss") if self.metric == "both" else (self.metric,)

    @property
    def reads(self) -> bool:
        """Whether the headline comes from reading whole rows."""
        return self.task in ("chat", "loss")

    @property
    def size(self) -> int:
        """Rows of all passes together."""
        return sum(len(self.asked if name == "generation" else self.rows) for name in self.passes)

    @cached_property
    def asked(self) -> list[dict]:
        """The rows whose answers can be generated and compared: of chats those with a short one."""
        return [row for row in self.rows if self.task != "chat" or row.get("answers")]

    @cached_property
    def most_tokens(self) -> int | None:
        """Length of generated answers."""
        if "generation" not in self.passes:
            return None
        return longest_answer(self.tokenizer, self.asked) if self.max_new_tokens is None else self.max_new_tokens

    def measure(self, model, bar: Progress, name: str) -> tuple[dict[str, Score], list[str] | None]:
        """Scores by metric, the headline first, and the generated answers."""
        scores, answers, options = {}, None, {"batch_size": self.batch_size}
        if "generation" in self.passes:
            bar.begin(name, "accuracy" if self.task == "retrieval" else "F1")

            def tell(batch: list[int], found: list[str]) -> None:
                found_rows = [self.asked[i] for i in batch]
                bar.add(next(iter(self.score(found, found_rows, self.seed).values())).per_row)

            options |= {"max_new_tokens": self.most_tokens, "progress": tell}
            answers = generate_answers(model, self.tokenizer, self.asked, **options)
            scores = self.score(answers, self.asked, self.seed)
        if "loss" in self.passes:
            bar.begin(name, "loss")
            options = {"batch_size": self.batch_size, "progress": lambda _, losses: bar.add(losses)}
            read = teacher_forced(model, self.rows, edges=self.edges, seed=self.seed, **options)
            scores = read | scores if self.reads else scores | read
        if self.task == "loss":
            scores["perplexity"] = perplexity_of(scores["loss"])
        return scores, answers


def _score_retrieval(answers: Sequence[str], rows: Sequence[dict], seed: int) -> dict[str, Score]:
    return {"accuracy": score_retrieval(answers, rows, seed)}


SCORES = {"retrieval": _score_retrieval, **dict.fromkeys(("qa", "chat"), score_question_answering)}


def _settings(config: LRSAConfig, keep_ratios: Sequence[float]) -> list[LRSAConfig | None]:
    """The full cache, then the trained and the given keep ratios, falling."""
    found = {config.top_k: config} | {c.top_k: c for c in map(config.with_keep_ratio, keep_ratios)}
    return [None, *(found[top_k] for top_k in sorted(found, reverse=True) if top_k < config.lag_size)]


def _job(model, setting: Setting) -> tuple:
    """Model, adapter and the settings they are measured with."""
    adapter, own = (model.adapter, model.config) if isinstance(model, Variant) else (None, None)
    config = setting.config
    if config is not None and own is not None:
        config = own.with_keep_ratio(config.keep_ratio)
    return id(_plain(model)), isinstance(model, Variant), adapter, config


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
        "compressed_share": compressed, "lengths": lengths,
    }  # fmt: skip


def _details(models: dict, work: _Work) -> dict:
    lm = causal_lm(_plain(next(iter(models.values()))))
    versions = {
        "lrsa": lrsa.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": numpy.__version__, "python": platform.python_version(),
    }  # fmt: skip
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type
    generates = "generation" in work.passes
    compared = generates and work.task in ("qa", "chat")
    answers = [answer for row in work.asked for answer in row["answers"]] if compared else []
    return ({"comparison": rules_of(answers)} if answers else {}) | {
        "decoding": "greedy" if generates else None, "batch_size": work.batch_size, "max_new_tokens": work.most_tokens,
        "seed": work.seed, "device": device, "dtype": str(lm.dtype).removeprefix("torch."), "versions": versions,
    }  # fmt: skip


def _check(models, tokenizer, rows, task, metric) -> None:
    for name, value, allowed in (("task", task, TASKS), ("metric", metric, METRICS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    if task != "loss" and metric != "loss" and tokenizer is None:
        raise ValueError(f"task {task!r} needs a tokenizer, to decode the answers.")
    if not models:
        raise ValueError("models is empty: give at least one model to evaluate.")
    for name, model in models.items():
        known = list(getattr(model.model, "peft_config", ())) if isinstance(model, Variant) else []
        if isinstance(model, Variant) and model.adapter is not None and model.adapter not in known:
            raise ValueError(f"model {name!r} has no adapter {model.adapter!r}: it has {', '.join(known)}.")
    fields = {"loss": ("input_ids",), "chat": ("input_ids", "prompt_length")}
    check_rows(rows, fields.get(task, ("input_ids", "prompt_length", "answers")))
    if task != "loss" and metric != "generation" and not all(len(r["input_ids"]) > r["prompt_length"] for r in rows):
        raise ValueError('a row ends with its prompt: append its answer to input_ids, or set metric="generation".')
