"""Pictures of a report: score against keep ratio, and the losses of the training against steps.

Colours are fit for colour-blind readers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from lrsa.evaluation.extra import extra
from lrsa.evaluation.results import Results
from lrsa.evaluation.score import CONFIDENCE, Score

PICTURE = "score_vs_keep_ratio.png"
TRAINING_PICTURE = "training_losses.png"
# Okabe and Ito's colours; the last model, which a report is about, always gets the first one.
COLOURS = ("#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7", "#E69F00")
MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.", "--", ":")
AXES = {
    "accuracy": "retrieval accuracy",
    "f1": "answer F1",
    "loss": "loss, nats per token (lower is better)",
}
HELD_OUT = {"eval_loss": "held out", "eval_loss_full_cache": "held out, full cache"}
AUXILIARY = {"selection": "selection loss, nats", "distillation": "distillation loss, nats per token"}


def draw_scores(results: Results, path: Path, by_memory: bool = False) -> None:
    """Write headline and loss against keep ratio, a panel each: one line per model, with its interval.

    Args:
        by_memory: put each point where the share of tokens that its cache holds is, in place of the keep ratio.
    """
    metrics = results.compared
    figure = _figure(1.5 + 5.5 * len(metrics), 4.2 + 0.25 * (len(results.models) // 3))
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        for style, model in enumerate(reversed(results.models)):
            scores = [results.score(model, setting.name, metric) for setting in results.settings]
            cells = results.cells[model]
            shares = [cells[s.name].kept if by_memory else s.keep_ratio for s in results.settings]
            places = [-math.log2(share) for share in shares]
            colour = COLOURS[style % len(COLOURS)]
            if style == 0 or len(results.models) < 4:  # more intervals hide each other
                lows, highs = [score.low for score in scores], [score.high for score in scores]
                axes.fill_between(places, lows, highs, color=colour, alpha=0.14, linewidth=0)
            axes.plot(
                places, [score.value for score in scores], color=colour, label=model, zorder=9 - style,
                marker=MARKERS[style % len(MARKERS)], markersize=6.5,
                linestyle=LINES[style % len(LINES)], linewidth=2.4 if style == 0 else 1.8,
            )  # fmt: skip
        _mark_ratios(results, axes, by_memory)
        axes.set_ylabel(AXES[metric], fontsize=12)
        _plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 2 * len(metrics) if max(map(len, labels)) > 12 else 4)
    figure.legend(handles, labels, fontsize=11, frameon=False, loc="outside upper center", ncols=columns)
    figure.savefig(path, dpi=200 if len(metrics) == 1 else 150)


def _mark_ratios(results: Results, axes, by_memory: bool) -> None:
    """The axis of keep ratios or shares, and the ratio of the training."""
    what = "share of tokens in the cache at the end of a prompt" if by_memory else "kept share of each window"
    axes.set_xlabel(f"{what} (log scale)\nn = {results.rows['n']} rows; shaded: {CONFIDENCE:.0%} interval", fontsize=11)
    names = ["full cache", *(setting.name for setting in results.settings[1:])]
    axes.set_xticks([-math.log2(setting.keep_ratio) for setting in results.settings], names)
    for setting in results.settings:
        if setting.name == results.trained and not by_memory:
            place = -math.log2(setting.keep_ratio)
            axes.axvline(place, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"trained at {setting.name}", (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=10, color="#555555",
            )  # fmt: skip


def draw_training(logs: Mapping[str, Path], path: Path) -> bool:
    """Write the losses of a training against steps: one panel per kind of loss, one line per run and loss.

    Args:
        logs: name of a run -> its `log.jsonl`; what is not there is left out.
        path: of the picture.

    Returns:
        whether there was a loss to draw.
    """
    panels: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {}
    for run, log in logs.items():
        for key, points in _losses(log).items():
            panel = key if key in AUXILIARY else "held out" if key in HELD_OUT else "loss"
            panels.setdefault(panel, []).append((_line_name(run, key), points))
    if not panels:
        return False
    figure = _figure(4.2 * len(panels) + 0.6, 3.8)
    for axes, (kind, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for style, (name, points) in enumerate(lines):
            axes.plot(
                *zip(*points, strict=True), label=name, color=COLOURS[style % len(COLOURS)],
                marker=MARKERS[style % len(MARKERS)] if len(points) < 40 else None, markersize=4,
                linestyle=LINES[style % len(LINES)], linewidth=1.8,
            )  # fmt: skip
        axes.set_xlabel("optimizer steps", fontsize=11)
        own = "held-out loss, nats per token" if kind == "held out" else "training loss, nats per token"
        axes.set_ylabel(AUXILIARY.get(kind, own), fontsize=11)
        _plain(axes)
        axes.legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _losses(log: Path) -> dict[str, list[tuple[int, float]]]:
    """`(step, value)` of every loss in a `log.jsonl`, by its key; values that are not finite are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for values in map(json.loads, lines):
        for key, value in values.items():
            if (key.startswith("loss") or key in HELD_OUT or key in AUXILIARY) and math.isfinite(value):
                found.setdefault(key, []).append((values["step"], value))
    return found


def _line_name(run: str, key: str) -> str:
    """Such as `LRSA-LoRA`, or `LRSA-LoRA, keep 0.125` for the key `loss_keep_0.125`."""
    if key in HELD_OUT:
        return f"{run}, {HELD_OUT[key]}"
    part = key.removeprefix("loss").strip("_").replace("_", " ")
    return f"{run}, {part}" if part and key not in AUXILIARY else run


def _figure(width: float, height: float):
    """The object, not pyplot: nothing global is touched and no display is needed."""
    return extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _plain(axes) -> None:
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(alone: Mapping[int, Score], whole: Mapping[int, Score], path: Path) -> None:
    """Write what each layer costs when it alone is compressed, and what the cache costs with the worst of them whole.

    Args:
        alone: layer -> loss above the full cache.
        whole: number of whole layers -> loss above the full cache, all at one size of the cache.
        path: of the picture.
    """
    figure = _figure(12, 4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes, points in ((left, alone), (right, whole)):
        places, scores = list(points), list(points.values())
        # A percentile interval need not hold the mean, which error bars insist on.
        errors = [[max(s.value - s.low, 0) for s in scores], [max(s.high - s.value, 0) for s in scores]]
        style = {"yerr": errors, "color": COLOURS[0]}
        if axes is left:
            axes.bar(places, [s.value for s in scores], error_kw={"ecolor": "#555555", "elinewidth": 1}, **style)
        else:
            axes.errorbar(places, [s.value for s in scores], marker="o", capsize=3, **style)
            axes.set_ylim(bottom=min(0, *(s.low for s in scores)))
        axes.xaxis.set_major_locator(extra("matplotlib.ticker").MaxNLocator(integer=True))
        axes.set_ylabel("nats per token above the full cache", fontsize=11)
        _plain(axes)
    left.set_xlabel("layer that alone is compressed", fontsize=11)
    right.set_xlabel("worst layers kept whole, at one size of the cache", fontsize=11)
    note = f"bars: {CONFIDENCE:.0%} intervals over {scores[0].n} rows, paired with the full cache"
    figure.suptitle(note, fontsize=10, color="#555555")
    figure.savefig(path, dpi=150)
