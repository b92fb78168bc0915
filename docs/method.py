"""The picture of the method: which keys each query sees, and what the cache holds.

    python docs/method.py        # writes docs/method.png

Every coloured cell is an answer of `lrsa.visibility.visible` over what `lrsa.select_tokens` kept of random keys and
values. The picture carries a digest of its cells, so that a test can tell when the rule has changed.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

sys.path.insert(0, str(Path(__file__).parents[1]))

from lrsa import LRSAConfig, Selection, select_tokens
from lrsa.visibility import visible

PICTURE = Path(__file__).with_name("method.png")
CONFIG = LRSAConfig(sink_size=2, lag_size=8, top_k=2)
LENGTH = CONFIG.sink_size + 4 * CONFIG.lag_size + 5  # four complete windows and the beginning of a fifth
FUTURE, DROPPED, SINK, KEPT, NEAR = range(5)
COLOURS = {FUTURE: "#ffffff", DROPPED: "#ececec", SINK: "#e69f00", KEPT: "#d55e00", NEAR: "#6fb1de"}
INK, FAINT = "#222222", "#8a8a8a"
LEGEND = (
    (SINK, "sink", f"the first {CONFIG.sink_size} tokens of a row, always"),
    (KEPT, "kept", f"top_k = {CONFIG.top_k} of every older window of lag_size = {CONFIG.lag_size}:\n"
     "the tokens that stand out most, measured in the\nvalue range of the window after them"),
    (NEAR, "previous and own window", "whole, up to the query itself"),
    (DROPPED, "dropped", "no longer seen, and no longer in the cache"),
)  # fmt: skip
USE = (
    "Training computes all rows in one forward pass.\n"
    "Inference holds the last row as its cache, which drops\n"
    "tokens once the window after theirs is complete."
)


def cells() -> torch.Tensor:
    """Why a query sees a key, or does not: one of the five constants, `[LENGTH, LENGTH]` (queries, keys)."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 1, LENGTH, 16, generator=generator)
    selection, position = select_tokens(keys, values, CONFIG), torch.arange(LENGTH)
    seen = visible(selection, position, LENGTH, CONFIG)[0, 0]
    without_selection = visible(Selection(selection.index[:, :, :0]), position, LENGTH, CONFIG)[0, 0]
    result = torch.where(position[:, None] >= position, DROPPED, FUTURE)
    result[seen] = KEPT
    result[without_selection] = NEAR
    result[:, : CONFIG.sink_size][seen[:, : CONFIG.sink_size]] = SINK
    return result


def digest(reasons: torch.Tensor) -> str:
    """A digest of the cells, which the picture carries as its description."""
    return hashlib.sha256(bytes(reasons.flatten().tolist())).hexdigest()


def draw(path: Path) -> None:
    """Write the picture, 9.6 x 5.6 inches on white."""
    reasons = cells()
    figure = Figure(figsize=(9.6, 5.6), facecolor="white")
    axes = figure.add_axes((0.015, 0.01, 0.6, 0.98))
    axes.set(xlim=(-2.2, LENGTH + 4), ylim=(LENGTH + 6.6, -1.6), aspect="equal", anchor="W")
    axes.axis("off")
    squares(axes, [(key, query, int(reasons[query, key])) for query in range(LENGTH) for key in range(query + 1)])
    windows(axes)
    cache(axes, reasons[-1].tolist())
    legend(figure)
    figure.savefig(path, dpi=200, metadata={"Description": digest(reasons), "Software": None})


def squares(axes, places: list[tuple[float, float, int]]) -> None:
    """Draw one square per `(x, y, reason)`."""
    boxes = [Rectangle((x + 0.06, y + 0.06), 0.88, 0.88) for x, y, _ in places]
    axes.add_collection(PatchCollection(boxes, facecolors=[COLOURS[reason] for *_, reason in places], linewidths=0))


def windows(axes) -> None:
    """Name the windows above their columns and draw their borders."""
    starts = list(range(CONFIG.sink_size, LENGTH, CONFIG.lag_size))
    for start in starts:
        axes.plot([start, start], [start - 0.2, LENGTH + 0.2], color=FAINT, lw=0.7, ls=(0, (2, 2)), zorder=0)
    for window, start in enumerate(starts):
        end = min(start + CONFIG.lag_size, LENGTH)
        axes.text((start + end) / 2, start - 0.7, f"window {window}", ha="left", va="bottom", fontsize=9, color=INK)
    axes.text(-0.9, LENGTH / 2, "query", rotation=90, ha="center", va="center", fontsize=10, color=INK)


def cache(axes, last: list[int]) -> None:
    """Draw below the matrix what is left of its last row, moved together."""
    held = [key for key, reason in enumerate(last) if reason in (SINK, KEPT, NEAR)]
    assert len(held) == CONFIG.kept_length(LENGTH)
    top = LENGTH + 3.4
    for place, key in enumerate(held):
        corners = [(key, LENGTH + 0.1), (key + 1, LENGTH + 0.1), (place + 1, top - 0.1), (place, top - 0.1)]
        axes.add_patch(Polygon(corners, color=COLOURS[last[key]], alpha=0.28, linewidth=0, zorder=-1))
    squares(axes, [(place, top, last[key]) for place, key in enumerate(held)])
    text = f"the cache: {len(held)} of {LENGTH} tokens, for each KV head its own"
    axes.text(0, top + 1.6, text, ha="left", va="top", fontsize=10, color=INK)


def legend(figure: Figure) -> None:
    """Explain the colours, and where the matrix is met."""
    axes = figure.add_axes((0.565, 0.0, 0.43, 1.0))
    axes.set(xlim=(0, 10), ylim=(14, 0))
    axes.axis("off")
    axes.text(0, 0.85, "Which keys a query sees", fontsize=14, weight="bold", va="center", color=INK)
    place = 1.9
    for reason, name, meaning in LEGEND:
        axes.add_patch(Rectangle((0, place - 0.22), 0.42, 0.44, facecolor=COLOURS[reason], linewidth=0))
        axes.text(0.7, place, name, fontsize=11.5, weight="bold", va="center", color=INK)
        axes.text(0.7, place + 0.34, meaning, fontsize=10, va="top", color=INK, linespacing=1.35)
        place += 1.32 + 0.52 * meaning.count("\n")
    axes.text(0.7, place + 0.35, USE, fontsize=10, va="top", color=INK, linespacing=1.35)


if __name__ == "__main__":
    draw(PICTURE)
