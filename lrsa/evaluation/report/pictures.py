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
from lrsa.evaluation.score import CONFIDENCE

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
AUXILIARY = {"selection": "selection loss, nats", "distillation": "distillation loss, nats per token"}


def draw_scores(results: Results, path: Path) -> None:
    """Write the first metric against keep ratio, one line per model with its interval, 7 x 4.2 inches at 200 dpi."""
    figure = _figure(7, 4.2)
    axes = figure.add_subplot()
    places = [-math.log2(setting.keep_ratio) for setting in results.settings]
    for style, model in enumerate(reversed(results.models)):
        scores = [results.score(model, setting.name) for setting in results.settings]
        lows, highs = [score.low for score in scores], [score.high for score in scores]
        colour = COLOURS[style % len(COLOURS)]
        axes.fill_between(places, lows, highs, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            places, [score.value for score in scores], color=colour, label=model, zorder=9 - style,
            marker=MARKERS[style % len(MARKERS)], markersize=6.5,
            linestyle=LINES[style % len(LINES)], linewidth=2.4 if style == 0 else 1.8,
        )  # fmt: skip
    for setting, place in zip(results.settings, places, strict=True):
        if setting.name == results.trained:
            axes.axvline(place, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"trained at {setting.name}", (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=10, color="#555555",
            )  # fmt: skip
    axes.set_xticks(places, ["full cache", *(setting.name for setting in results.settings[1:])])
    note = f"shaded: {CONFIDENCE:.0%} interval of {results.rows['n']} rows"
    axes.set_xlabel(f"kept share of each window (log scale); {note}", fontsize=11)
    axes.set_ylabel(AXES[results.metrics[0]], fontsize=12)
    _plain(axes)
    figure.legend(fontsize=11, frameon=False, loc="outside upper center", ncols=min(len(results.models), 4))
    figure.savefig(path, dpi=200)


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
            panels.setdefault(key if key in AUXILIARY else "loss", []).append((_line_name(run, key), points))
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
        axes.set_ylabel(AUXILIARY.get(kind, "training loss, nats per token"), fontsize=11)
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
            if (key.startswith("loss") or key in AUXILIARY) and math.isfinite(value):
                found.setdefault(key, []).append((values["step"], value))
    return found


def _line_name(run: str, key: str) -> str:
    """Such as `LRSA-LoRA`, or `LRSA-LoRA, keep 0.125` for the key `loss_keep_0.125`."""
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
