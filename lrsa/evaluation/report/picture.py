"""Score against keep ratio: one line per model with its interval, in colours fit for colour-blind readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa.evaluation.report.score import CONFIDENCE

if TYPE_CHECKING:
    from lrsa.evaluation.report.results import Results

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
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=11, frameon=False, loc="outside upper center", ncols=min(len(results.models), 4))
    figure.savefig(path, dpi=200)
