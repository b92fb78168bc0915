"""Score against keep ratio: one line per model with its interval, in colours fit for colour-blind readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrsa.evaluation.results import Results

# Okabe and Ito's colours; the last model, which a report is about, always gets the first one.
COLOURS = ("#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7", "#E69F00")
MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.", "--", ":")
AXES = {
    "accuracy": "retrieval accuracy",
    "f1": "answer F1",
    "loss": "loss, nats per token (lower is better)",
}


def draw(results: Results, path: Path) -> None:
    """Write the picture: 7 x 4.2 inches at 200 dots per inch, so that it is sharp and readable 700 pixels wide."""
    from matplotlib.figure import Figure  # the object, not pyplot: nothing global is touched and no display is needed

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    places = [-math.log2(setting.keep_ratio) for setting in results.settings]
    order = len(results.models) - 1
    for number, model in enumerate(results.models):
        style = order - number
        scores = [results.score(model, setting.name) for setting in results.settings]
        colour = COLOURS[style % len(COLOURS)]
        lows, highs = [score.low for score in scores], [score.high for score in scores]
        axes.fill_between(places, lows, highs, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            places, [score.value for score in scores], color=colour, label=model, zorder=3 + number,
            marker=MARKERS[style % len(MARKERS)], markersize=6.5,
            linestyle=LINES[style % len(LINES)], linewidth=2.4 if style == 0 else 1.8,
        )  # fmt: skip
    for setting, place in zip(results.settings, places, strict=True):
        if setting.name == results.trained:
            axes.axvline(place, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                "trained at", (place, 1), xycoords=("data", "axes fraction"), xytext=(-5, -6),
                textcoords="offset points", ha="right", va="top", fontsize=10, color="#555555",
            )  # fmt: skip
    axes.set_xticks(places, ["full cache", *(setting.name for setting in results.settings[1:])])
    axes.set_xlabel("kept share of each window (log scale)", fontsize=12)
    axes.set_ylabel(AXES[results.metrics[0]], fontsize=12)
    axes.set_title(f"n = {results.rows['n']} rows; shaded: 95% interval", fontsize=11, loc="left", color="#444444")
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=11, frameon=False, loc="best")
    figure.savefig(path, dpi=200)
