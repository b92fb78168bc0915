"""Runs the suite: every task at every length is one comparison of the same models and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lrsa.config import LRSAConfig
from lrsa.evaluation.comparison import compare
from lrsa.evaluation.measure.generation import longest_answer
from lrsa.evaluation.results import Results
from lrsa.evaluation.score import Score
from lrsa.evaluation.suite.harness_rows import LONGBENCH, RULER, harness_rows
from lrsa.evaluation.suite.needles import multi_key_rows, multi_value_rows, passkey_rows, score_numbers
from lrsa.prompt import PromptFormat

NEEDLES = {
    "passkey_16": passkey_rows,
    "passkey_64": lambda *args: passkey_rows(*args, digits=64),
    "multi_key": multi_key_rows,
    "multi_value": multi_value_rows,
}
HARNESS = {"ruler": RULER, "longbench": LONGBENCH}
TASKS = (*NEEDLES, "questions", "position", *HARNESS)
SPARE = 16  # tokens that a generated answer may have beyond the right one: "The pass key is"
BINS = 8


@dataclass
class Suite:
    """What `long_context` measured.

    Attributes:
        parts: (task, length) -> results.
        depths: (task, length) -> the depth of every row, None where there is none.
        skipped: task -> why it was not measured.
    """

    parts: dict[tuple[str, int], Results] = field(default_factory=dict)
    depths: dict[tuple[str, int], list[float | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def cells(self) -> Iterator[dict]:
        """Every measured number with its interval: by task, length, depth (None: all together), model and cache."""
        for (task, length), results in self.parts.items():
            depths = self.depths[task, length]
            for model in results.models:
                for setting in results.settings:
                    for metric, score in results.cells[model][setting.name].scores.items():
                        for depth in dict.fromkeys((None, *depths)):
                            rows = [x for x, d in zip(score.per_row, depths, strict=True) if depth in (None, d)]
                            found = score if depth is None else Score.from_rows(rows, score.unit)
                            yield {
                                "task": task, "length": length, "depth": depth, "model": model, "cache": setting.name,
                                "metric": metric, "value": found.value, "low": found.low, "high": found.high,
                                "n": found.n,
                            }  # fmt: skip


def long_context(
    models: Mapping,
    tokenizer,
    turn: PromptFormat,
    config: LRSAConfig,
    keep_ratios: Sequence[float] = (0.25,),
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] = TASKS,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    count: int = 4,
    questions: Mapping[int, Sequence[dict]] | None = None,
    each: Callable[[Suite], object] = lambda suite: None,
    seed: int = 0,
    metric: str = "both",
    **options,
) -> Suite:
    """Measure models with the full cache and with compressed ones on long contexts.

    Args:
        models, tokenizer, config, keep_ratios, metric, options: as `compare` takes them.
        turn: what stands around prompts and answers.
        lengths: tokens of a row, prompt and answer together.
        tasks: of `TASKS`. `passkey_16`, `passkey_64` and `multi_key` have `count` rows at every depth, the others
            `count` times the number of depths.
        questions: length -> rows of questions over real passages, for `questions` (F1) and `position` (the loss of all
            tokens by their place in the row); without them these tasks are skipped.
        each: called after every task and length with what there is so far, for example to save it.

    Raises:
        ValueError: when a task is not known, a length is too short, or as `compare`.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"tasks of the suite are {', '.join(TASKS)}, got {', '.join(sorted(unknown))}.")
    suite, total = Suite(), count * len(depths)
    options |= {"seed": seed, "metric": metric}

    def measure(task: str, length: int, rows: Sequence[dict], kind: str, most: int | None = None, **how) -> None:
        if kind != "loss":
            how["max_new_tokens"] = longest_answer(tokenizer, rows) + SPARE if most is None else most
        suite.parts[task, length] = compare(models, tokenizer, rows, kind, config, keep_ratios, **options | how)
        suite.depths[task, length] = [row.get("depth") for row in rows]
        each(suite)

    for length in lengths:
        for task in (task for task in NEEDLES if task in tasks):
            rows = NEEDLES[task](tokenizer, turn, length, depths, count, seed)
            measure(task, length, rows, "retrieval", score=score_numbers)
        _measure_questions(suite, measure, tasks, length, list((questions or {}).get(length, ()))[:total])
        for group in (group for group in HARNESS if group in tasks):
            _measure_group(suite, group, measure, tokenizer, turn, length, total)
    return suite


def _measure_questions(suite: Suite, measure: Callable, tasks: Sequence[str], length: int, asked: list[dict]) -> None:
    for task in {"questions", "position"} & set(tasks):
        if not asked:
            suite.skipped[f"{task}, {length} tokens"] = "there are no rows of questions of this length"
    if asked and "questions" in tasks:
        measure("questions", length, asked, "qa")
    if asked and "position" in tasks:
        texts = [{"input_ids": row["input_ids"]} for row in asked]
        shortest = min(len(text["input_ids"]) for text in texts)
        measure("position", length, texts, "loss", edges=[shortest * k // BINS for k in range(BINS + 1)])


def _measure_group(suite: Suite, group: str, measure, tokenizer, turn: PromptFormat, length: int, count: int) -> None:
    """The tasks of one group; what cannot be had is written down with its reason, and so are the tasks behind it."""
    reason = ""
    for name in HARNESS[group]:
        if not reason:
            try:
                rows, score, most = harness_rows(name, tokenizer, turn, length, count)
            except Exception as error:  # code of the tasks and of the Hub's client: anything may come out of it
                reason = (str(error).strip() or "it cannot be loaded").splitlines()[0]
        if reason:
            suite.skipped[f"{name}, {length} tokens"] = reason
            reason = reason if group == "longbench" else ""
        else:
            measure(name, length, rows, "retrieval", most, score=score, metric="generation")
