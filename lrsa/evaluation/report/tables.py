"""Results as a directory of files, as Markdown, and as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrsa.evaluation.extra import extra
from lrsa.evaluation.measure.cost import LayerCost
from lrsa.evaluation.report.pictures import PICTURE, TRAINING_PICTURE, draw_scores
from lrsa.evaluation.results import Results, Setting
from lrsa.evaluation.score import CONFIDENCE, RESAMPLES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TITLES = {
    "accuracy": "Retrieval accuracy (share of the answer's symbols in place)",
    "f1": "Answer F1",
    "exact_match": "Exact match",
    "loss": "Loss (nats per token, lower is better)",
    "token_accuracy": "Token accuracy (share of the tokens predicted right while reading the right ones)",
    "perplexity": "Perplexity (lower is better)",
}
EXAMPLES, EXAMPLE_WIDTH = 3, 60
TRAINING = f"![Losses of the training against steps]({TRAINING_PICTURE})"


def save_report(results: Results, directory: str | Path, first: Sequence[str] = ()) -> Path:
    """Write `results.json`, `report.md` and `score_vs_keep_ratio.png` into `directory` (made if missing).

    The report also shows the losses of the training when `draw_training` has left its picture there.

    Args:
        first: sections of Markdown that the report begins with.
    """
    directory = results.save(directory)
    trained = (directory / TRAINING_PICTURE).is_file()
    (directory / "report.md").write_text(markdown(results, trained, first), encoding="utf-8")
    draw_scores(results, directory / PICTURE, by_memory=not results.is_trained)
    return directory


def markdown(results: Results, trained: bool = False, first: Sequence[str] = ()) -> str:
    """The whole report as Markdown; `trained`: with the picture of `draw_training`."""
    sections = [f"# Evaluation: {results.task}", *first, measurements(results)]
    if trained:
        sections.append(f"## Training\n\n{TRAINING}")
    if results.expected:
        sections.append(f"## Examples\n\n{markdown_table(_example_rows(results))}")
    sections.append(f"## Settings\n\n{markdown_table(_setting_rows(results))}")
    return "\n\n".join(sections) + "\n"


def measurements(results: Results) -> str:
    """What was measured and how, as Markdown: picture, scores, differences and cost. A model card shows it too."""
    sections = [
        _measured(results),
        *([f"**Warning:** {results.warning}."] if results.warning else []),
        f"![Scores against keep ratio]({PICTURE})",
        *(
            f"## {TITLES[metric]}\n\n{markdown_table(_score_rows_with_share(results, metric))}"
            for metric in results.metrics
        ),
    ]
    if by_length := _length_rows(results):
        sections.append(f"## By length ({results.metrics[0].replace('_', ' ')})\n\n{markdown_table(by_length)}")
    for metric in results.differences:
        title = _difference_title(results, metric)
        sections.append(f"## {title}\n\n{markdown_table(_difference_rows(results, metric))}")
    sections.append(f"## {_cost_title(results)}\n\n{markdown_table(_cost_rows(results))}")
    return "\n\n".join(sections)


def print_report(results: Results, console: Console | None = None) -> None:
    """Show scores, differences and cost on the terminal, as tables of `rich`."""
    console = console or extra("rich.console").Console()
    tables = [(TITLES[metric], _score_rows(results, metric)) for metric in results.metrics]
    tables += [(_difference_title(results, m), _difference_rows(results, m)) for m in results.differences]
    tables.append((_cost_title(results), _cost_rows(results)))
    for title, rows in tables:
        console.print(_rich_table(title, rows, console.width))
    console.print(f"n = {results.rows['n']}, {CONFIDENCE:.0%} bootstrap intervals. Prefill: {results.prefill}.")
    if results.warning:
        console.print(f"[bold yellow]Warning:[/] {results.warning}.")


def _rich_table(title: str, rows: list[list[str]], width: int) -> Table:
    """A table; intervals go below their values when they do not fit beside them."""
    box, escape, tables = extra("rich.box"), extra("rich.markup").escape, extra("rich.table")
    needed = sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))
    between = " " if needed <= width else "\n"
    table = tables.Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    head, *body = ([escape(cell.replace(" [", f"{between}[")) for cell in row] for row in rows)
    for column, name in enumerate(head):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table


def _measured(results: Results) -> str:
    rows, ratios = results.rows, "the full cache only" if results.trained == "full" else f"keep ratio {results.trained}"
    ratios = ratios if results.is_trained else "nothing, this is a model as it was found"
    compared = results.details.get("comparison")
    by = f" Answers are compared by {compared}; in brackets the number of correct answers." if compared else ""
    return (
        f"{rows['n']} rows of {rows['shortest']} to {rows['longest']} tokens (median {rows['median']:g}), of which "
        f"{rows['compressed_share']:.0%} are long enough to be compressed. In brackets: {CONFIDENCE:.0%} interval, "
        f"percentile bootstrap over rows with {RESAMPLES} resamples; width 0 only says that all rows scored the same. "
        f"Trained for: {ratios}.{by}\n\nPrefill under a compressed cache: {results.prefill}."
    )


def _score_rows(results: Results, metric: str) -> list[list[str]]:
    rows = [["cache", *results.models]]
    for setting in results.settings:
        scores = (results.score(model, setting.name, metric) for model in results.models)
        rows.append([setting_name(results, setting), *map(str, scores)])
    return rows


def _score_rows_with_share(results: Results, metric: str) -> list[list[str]]:
    """A page is wider than a terminal. The share is that of the rows behind the scores; bytes are the longest row's."""
    held = [[cells[setting.name].kept for cells in results.cells.values()] for setting in results.settings]
    shares = ["tokens held", *(" to ".join(dict.fromkeys(f"{x:.1%}" for x in (min(all_), max(all_)))) for all_ in held)]
    rows = zip(_score_rows(results, metric), shares, strict=True)
    return [[name, share, *scores] for (name, *scores), share in rows]


def _length_rows(results: Results) -> list[list[str]]:
    """The headline in up to four groups of equally many rows, from short to long; nothing for rows of one length."""
    lengths = results.rows.get("lengths", [])
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [list(map(int, group)) for group in np.array_split(order, min(4, len(order) // 2) or 1)]
    if len(groups) == 1 or len(set(lengths)) == 1:
        return []
    table = [["tokens", "rows", "cache", *results.models]]
    for group in groups:
        tokens = f"{lengths[group[0]]} to {lengths[group[-1]]}"
        for setting in (s for s in results.settings if s.name in ("full", results.trained)):
            scores = [results.score(model, setting.name).per_row for model in results.models]
            means = [f"{sum(rows[i] for i in group) / len(group):.3f}" for rows in scores]
            table.append([tokens, str(len(group)), setting_name(results, setting), *means])
    return table


def setting_name(results: Results, setting: Setting) -> str:
    """`full cache`, `keep 1/4`, or `keep 1/8 (trained)`."""
    if setting.config is None:
        return "full cache"
    return f"keep {setting.name}" + (" (trained)" if results.is_trained and setting.name == results.trained else "")


def _difference_title(results: Results, metric: str) -> str:
    return f"{results.models[-1]} minus the others, row by row ({metric.replace('_', ' ')})"


def _difference_rows(results: Results, metric: str) -> list[list[str]]:
    differences = results.differences[metric]
    rows = [["cache", *(f"minus {other}" for other, _ in differences)]]
    for setting in results.settings:
        found = (scores[setting.name] for _, scores in differences)
        cells = (f"{score.value:+.3f} [{score.low:+.3f}, {score.high:+.3f}]" for score in found)
        rows.append([setting_name(results, setting), *cells])
    return rows


def _cost_title(results: Results) -> str:
    return f"Cache of the longest row ({results.rows['longest']} tokens), measured after prefill"


def _cost_rows(results: Results) -> list[list[str]]:
    """For every setting a line on each group of layers that cost the same, and one on all layers together."""
    rows = [["cache", "layers", "kept per head", "memory", "full cache", "share"]]
    for setting in results.settings:
        name = setting_name(results, setting).removesuffix(" (trained)")
        groups: dict[tuple[str, ...], list[int]] = {}
        for layer in setting.cost:
            numbers = f"{layer.kept} of {layer.seen}", *_sizes(layer.bytes, layer.full_bytes)
            groups.setdefault(numbers, []).append(layer.layer)
        rows += [[name, f"each of {_ranges(layers)}", *numbers] for numbers, layers in groups.items()]
        rows.append([name, "all", "", *_whole(setting.cost)])
    return rows


def _ranges(layers: list[int]) -> str:
    """0-17, 19-22, 24"""
    runs = [[place for _, place in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _whole(cost: list[LayerCost]) -> list[str]:
    return _sizes(sum(layer.bytes for layer in cost), sum(layer.full_bytes for layer in cost))


def _sizes(used: int, full: int) -> list[str]:
    return [_size(used), _size(full), f"{used / full:.1%}"]


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def _example_rows(results: Results) -> list[list[str]]:
    """The first rows: what was expected, and what every model wrote with the full and with the trained cache."""
    settings = dict.fromkeys(["full", results.trained])
    rows = [["row", "expected", *(f"{model}, {setting}" for model in results.models for setting in settings)]]
    for row, expected in enumerate(results.expected[:EXAMPLES]):
        found = [results.cells[model][setting].answers[row] for model in results.models for setting in settings]
        rows.append([str(row), *map(_shortened, [" / ".join(expected), *found])])
    return rows


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_WIDTH else text[: EXAMPLE_WIDTH - 1] + "…"


def _setting_rows(results: Results) -> list[list[str]]:
    details = {key: value for key, value in results.details.items() if key != "versions"}
    versions = ", ".join(f"{name} {version}" for name, version in results.details["versions"].items())
    lrsa = ", ".join(f"{name} {value}" for name, value in results.config.to_dict().items())
    # A cell that several models share, the full cache of one set of weights, took its time once.
    seconds = sum({cell.seconds for by_setting in results.cells.values() for cell in by_setting.values()})
    values = {"lrsa": lrsa} | details | {"versions": versions, "time": f"{seconds:.0f} s"}
    named = [[name.replace("_", " "), str(value)] for name, value in values.items() if value is not None]
    return [["setting", "value"], *named]


def markdown_table(rows: list[list[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] + ["---:" if body and _is_number(body[0][i]) else "---" for i in range(1, len(head))], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "+-"
