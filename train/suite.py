"""The long-context suite on a run or on a model: its lengths, its questions from the run's data, its controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

import data
from lrsa.config import LRSAConfig
from lrsa.evaluation import Variant
from lrsa.evaluation.measure.controls import CONTROLS
from lrsa.evaluation.suite import TASKS, long_context, save_suite
from train.settings.load import RunSettings
from train.settings.schema import WHOLE_SUITE


def run_suite(
    settings: RunSettings,
    config: LRSAConfig,
    models: Mapping[str, Variant],
    tokenizer: PreTrainedTokenizerBase,
    corpus: data.Corpus,
    console: Console,
    out: Path,
) -> None:
    """Measure the models of a run, and its last one with other choices of tokens, and write `suite.md`.

    Args:
        settings: `eval.suite` names the tasks; `long_context` is all of them.
        config: compression of the run.
        corpus: of the run; questions of other lengths are made from its held-out ones alone.

    Raises:
        ValueError: as `lrsa.evaluation.suite.long_context`.
    """
    *others, last = models
    controls = {
        f"{last}, {name}": models[last]._replace(config=control(**config)) for name, control in CONTROLS.items()
    }
    ordered = {name: models[name] for name in others} | controls | {last: models[last]}
    tasks = TASKS if WHOLE_SUITE in settings.eval.suite else settings.eval.suite
    lengths = settings.eval.suite_lengths or _lengths(models[last])
    depths = settings.eval.suite_depths
    suite = long_context(
        ordered, tokenizer, corpus.prompt, config, settings.eval.keep_ratios, lengths=lengths, tasks=tasks,
        depths=[depth / max(depths - 1, 1) for depth in range(depths)], count=settings.eval.suite_rows,
        questions=_questions(settings, tokenizer, corpus, lengths), metric=settings.eval.metric,
        batch_size=settings.eval.batch_size, seed=settings.train.seed, progress=not settings.train.disable_tqdm,
        each=lambda suite: save_suite(suite, out),
    )  # fmt: skip
    save_suite(suite, out)
    console.print(f"suite: {out / 'suite.md'}")


def _lengths(variant: Variant) -> list[int]:
    """Four lengths up to what the model can read, each twice the one before."""
    longest = variant.model.config.get_text_config().max_position_embeddings
    return [longest // factor for factor in (8, 4, 2, 1)]


def _questions(settings: RunSettings, tokenizer, corpus: data.Corpus, lengths: list[int]) -> dict[int, list[dict]]:
    """The held-out questions in rows of each length; data of another length may hold out others, which are left out."""
    sources = [source for source in settings.data.each().values() if source.kind == "qa"]
    held, found = {_question(row) for row in corpus.evaluation if row.get("answers")}, {}
    for length in lengths:
        found[length] = []
        for source in sources:
            changed = source.model_copy(
                update={"context_length": length, "max_rows": 1}
            )  # rows to train on are not read
            rows = data.load(changed, tokenizer, settings.train.seed, settings.lrsa.dense_length).evaluation
            found[length] += [row for row in rows if _question(row) in held]
    return found


def _question(row: dict) -> tuple:
    """What tells a question from others: its answers, and the end of its prompt, where the question stands."""
    return tuple(row["answers"]), row["prompt"][-160:]
