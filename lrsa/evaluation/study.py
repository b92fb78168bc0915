"""What a compressed cache costs a model before any training: keep ratios, lags, and other choices of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrsa.config import LRSAConfig
from lrsa.evaluation.comparison import compare
from lrsa.evaluation.measure.controls import SCORES
from lrsa.evaluation.measure.state import Variant
from lrsa.evaluation.report.tables import markdown_table, save_report
from lrsa.evaluation.results import Results
from lrsa.evaluation.score import Score, paired_difference

POINTS = (1, 3, 10)
NAMES = {"f1": "F1", "accuracy": "retrieval accuracy", "token_accuracy": "token accuracy"}


def study(
    model,
    tokenizer,
    rows: Sequence[dict],
    task: str,
    config: LRSAConfig,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125),
    *,
    lags: Sequence[int] = (),
    scores: Sequence[str] = tuple(SCORES),
    **options,
) -> Results:
    """Measure one model, as it stands, with the full cache and with every way to compress it, on the same rows.

    Args:
        model: a transformers causal LM.
        config: lag and the rest; its lag is measured with every score, and comes last in the results.
        lags: other values of `lag_size`, measured with the lag-relative scores.
        scores: of `lag_relative`, `recent` (the last tokens of every window) and `random`.
        tokenizer, rows, task, keep_ratios, options: as `compare` takes them.

    Raises:
        ValueError: when a score or a lag cannot be used, or as `compare`.
    """
    if unknown := [score for score in scores if score not in SCORES] or not scores:
        raise ValueError(f"scores must be of {', '.join(SCORES)}, got {unknown or 'none'}.")
    ways = [(lag, "lag_relative") for lag in lags if lag != config.lag_size]
    ways += [(config.lag_size, score) for score in sorted(scores, key=list(SCORES).index, reverse=True)]
    models = {}
    for lag, score in ways:
        own = SCORES[score](**config.to_dict() | {"lag_size": lag, "top_k": lag}).with_keep_ratio(config.keep_ratio)
        models[f"lag {lag}, {score.replace('_', '-')}"] = Variant(model, None, own)
    results = compare(models, tokenizer, rows, task, config, keep_ratios, **options)
    results.details["trained"] = False
    return results


def save_study(results: Results, directory: str | Path) -> Path:
    """`save_report` of what `study` found, beginning with what every keep ratio costs."""
    title, rows = "What compression costs this model", _cost_rows(results)
    return save_report(results, directory, [summary(results), f"## {title}\n\n{markdown_table(rows)}"])


def summary(results: Results) -> str:
    """In one sentence: what each keep ratio costs the model, and which loses less than 1, 3 and 10 points."""
    model, metric = results.models[-1], _metrics(results)[0]
    lost = {s.name: _lost(results, model, s.name, metric) for s in results.settings[1:]}
    costs = ", ".join(f"{name} costs {_points(score)}" for name, score in lost.items())
    full = results.score(model, metric=metric)
    limits = []
    for points in POINTS:
        within = [name for name, score in lost.items() if score.value * 100 < points]
        limits.append(f"less than {points} at {within[-1] if within else 'no ratio that was measured'}")
    return (
        f"**With the full cache this model has {full.value * 100:.1f} points of {NAMES[metric]} (n = {full.n}); to "
        f"keep of each window {costs} points ({model}). It loses {', '.join(limits)}.** A point is a hundredth; in "
        "brackets 95% intervals of the loss, paired by row; the limits go by the mean."
    )


def _metrics(results: Results) -> list[str]:
    """Those that points are counted in, the generated one first."""
    return [metric for metric in NAMES if metric in results.metrics]


def _lost(results: Results, model: str, setting: str, metric: str) -> Score:
    """The full cache's score minus the compressed one's, row by row."""
    full, found = results.score(model, metric=metric), results.score(model, setting, metric)
    return paired_difference(full, found, results.details["seed"])


def _points(score: Score) -> str:
    return f"{score.value * 100:.1f} [{score.low * 100:.1f}, {score.high * 100:.1f}]"


def _cost_rows(results: Results) -> list[list[str]]:
    metrics, losses = _metrics(results), "loss" in results.metrics
    rows = [
        ["kept by", "of a window", "share of the cache", *(f"points of {NAMES[metric]} lost" for metric in metrics)]
    ]
    rows[0] += ["nats lost"] if losses else []
    for model in reversed(results.models):
        for setting in results.settings[1:]:
            row = [model, setting.name, f"{results.cells[model][setting.name].kept:.1%}"]
            row += [_points(_lost(results, model, setting.name, metric)) for metric in metrics]
            if losses:
                nats = _lost(results, model, setting.name, "loss")
                row.append(f"{-nats.value:.3f} [{-nats.high:.3f}, {-nats.low:.3f}]")
            rows.append(row)
    return rows
