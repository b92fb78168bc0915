"""The suite as one report, one JSON and pictures: heat maps over lengths and depths, loss by position."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from lrsa.evaluation.extra import extra
from lrsa.evaluation.report.pictures import COLOURS, LINES
from lrsa.evaluation.report.tables import TITLES, markdown_table
from lrsa.evaluation.results import FULL
from lrsa.evaluation.score import CONFIDENCE
from lrsa.evaluation.suite.run import Suite

NAME = "suite"


def save_suite(suite: Suite, directory: str | Path) -> Path:
    """Write `suite.md`, `suite.json` and a picture per task into `directory` (made if missing).

    `suite.json` holds every cell with its interval and n, and whole results, with answers, by task and length.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    results = [{"task": t, "length": length} | {"results": r.to_dict()} for (t, length), r in suite.parts.items()]
    values = {"cells": list(suite.cells()), "skipped": suite.skipped, "results": results}
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    pictures = {}
    for task in dict.fromkeys(task for task, _ in suite.parts):
        if task == "position":
            pictures[task] = draw_positions(suite, directory / f"{NAME}_{task}.png")
        elif any(len(set(depths)) > 1 for (name, _), depths in suite.depths.items() if name == task):
            pictures[task] = draw_heat_map(suite, task, directory / f"{NAME}_{task}.png")
    (directory / f"{NAME}.md").write_text(_markdown(suite, pictures), encoding="utf-8")
    return directory


def _markdown(suite: Suite, pictures: dict[str, Path]) -> str:
    first = next(iter(suite.parts.values()), None)
    sections = ["# Long-context suite"]
    if first is not None:
        sections.append(
            f"In brackets: {CONFIDENCE:.0%} bootstrap interval over the n rows of a length. All models read the same "
            f"rows. A model with another choice of tokens in its name keeps those in place of the lag-relative ones. "
            f"Settings: {', '.join(f'{name} {value}' for name, value in first.config.to_dict().items())}; "
            f"{first.details['dtype']} on {first.details['device']}, seed {first.details['seed']}."
        )
    for task in dict.fromkeys(task for task, _ in suite.parts):
        parts = {length: results for (name, length), results in suite.parts.items() if name == task}
        one = next(iter(parts.values()))
        sections.append(f"## {task.replace('_', ' ')}")
        if task in pictures:
            sections.append(f"![{task} by place]({pictures[task].name})")
        for metric in (m for m in one.metrics if m in TITLES and m != "perplexity"):
            unit = one.score(one.models[0], metric=metric).unit
            title = f"Greedy answers: {unit}" if metric == "accuracy" else TITLES[metric]
            sections.append(f"{title}\n\n{markdown_table(_rows(parts, metric))}")
    if suite.skipped:
        skipped = [["task", "why"], *([name, why] for name, why in suite.skipped.items())]
        sections.append(f"## Not measured\n\n{markdown_table(skipped)}")
    return "\n\n".join(sections) + "\n"


def _rows(parts: dict, metric: str) -> list[list[str]]:
    models = next(iter(parts.values())).models
    rows = [["tokens", "n", "cache", *models]]
    for length, results in parts.items():
        for setting in results.settings:
            name = "full cache" if setting.name == FULL else f"keep {setting.name}"
            scores = [str(results.score(model, setting.name, metric)) for model in models]
            rows.append([str(length), str(results.rows["n"]), name, *scores])
    return rows


def draw_heat_map(suite: Suite, task: str, path: Path) -> Path:
    """The headline by length and depth: a row for each cache, a column for each model. Models that differ only in the
    tokens that they keep have one full cache, which stands in the last one's column."""
    parts = {length: results for (name, length), results in suite.parts.items() if name == task}
    first = next(iter(parts.values()))
    metric = next(m for m in ("accuracy", "token_accuracy") if m in first.metrics)
    cells = [c for c in suite.cells() if c["task"] == task and c["metric"] == metric and c["depth"] is not None]
    lengths, depths = list(parts), sorted({cell["depth"] for cell in cells})
    figure = extra("matplotlib.figure").Figure(
        figsize=(
            1.6 + len(first.models) * max(2.2, 0.75 * len(lengths)),
            0.9 + len(first.settings) * (1.1 + 0.4 * len(depths)),
        ),
        layout="constrained",
    )
    grid = figure.subplots(len(first.settings), len(first.models), squeeze=False)
    caches = [setting.name for setting in first.settings]
    for axes, (cache, (place, model)) in zip(grid.flat, product(caches, enumerate(first.models)), strict=True):
        if any(first.cells[model][cache] is first.cells[later][cache] for later in first.models[place + 1 :]):
            axes.set_axis_off()
            continue
        values = {(c["depth"], c["length"]): c["value"] for c in cells if (c["model"], c["cache"]) == (model, cache)}
        image = [[values[depth, length] for length in lengths] for depth in depths]
        shown = axes.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (depth, length), value in values.items():
            x, y, colour = lengths.index(length), depths.index(depth), "white" if value < 0.6 else "black"
            axes.text(x, y, f"{value:.2f}".removeprefix("0"), ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], fontsize=9)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=9)
        # Models that share a full cache differ in what follows the comma alone.
        name = model.partition(",")[0] if cache == FULL else model
        axes.set_title(f"{name}\n{'full cache' if cache == FULL else f'keep {cache}'}", fontsize=10)
    n = {cell["n"] for cell in cells}
    what = "digits or numbers right in greedy answers" if metric == "accuracy" else "tokens right, teacher-forced"
    figure.suptitle(f"{task.replace('_', ' ')}: {what}; n = {', '.join(map(str, n))} a cell", fontsize=11)
    figure.supxlabel("tokens of the row", fontsize=10)
    figure.supylabel("depth of the fact", fontsize=10)
    figure.colorbar(shown, ax=grid, shrink=0.8)
    figure.savefig(path, dpi=150)
    return path


def draw_positions(suite: Suite, path: Path) -> Path:
    """Loss by the place of a token in the longest rows, a line for every model and cache."""
    length = max(length for name, length in suite.parts if name == "position")
    results = suite.parts["position", length]
    bins = [metric for metric in results.metrics if metric.startswith("loss_")]
    places = [sum(map(int, metric.split("_")[1:])) / 2 for metric in bins]
    figure = extra("matplotlib.figure").Figure(figsize=(8, 4.4), layout="constrained")
    axes, seen = figure.subplots(), []
    for colour, model in enumerate(reversed(results.models)):
        for style, setting in enumerate(results.settings):
            cell = results.cells[model][setting.name]
            if any(cell is other for other in seen):
                continue
            seen.append(cell)
            name = f"{model.partition(',')[0]}, full cache" if setting.name == FULL else f"{model}, keep {setting.name}"
            axes.plot(
                places, [cell.scores[metric].value for metric in bins], label=name, linewidth=1.8,
                color=COLOURS[colour % len(COLOURS)], linestyle=LINES[style % len(LINES)], marker="o", markersize=3.5,
            )  # fmt: skip
    axes.set_xlabel(f"position in the row, tokens (rows of up to {length}, n = {results.rows['n']})", fontsize=11)
    axes.set_ylabel("loss, nats per token", fontsize=11)
    axes.grid(axis="y", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)
    return path


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
