"""Results of an experiment as a table and pictures: every arm at every keep ratio, and over training steps.

Scores are means over seeds of each row's score; intervals and paired differences are over rows, and the spread over
seeds is shown beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrsa.evaluation import Results, Score, paired_difference
from train.evaluation import BASE
from train.experiments.arms import Experiment, run_directory, training_seconds

ArmResults = dict[str, list[Results]]  # arm -> results of its seeds
Curves = dict[str, dict[int, list[Results]]]  # arm -> step -> results of its seeds; the base has step 0 alone


def mean_score(results: Sequence[Results], setting: str) -> Score | None:
    """Mean over seeds of each row's score, with an interval over rows; None when the setting was not measured."""
    if setting not in [s.name for s in results[0].settings]:
        return None
    scores = [result.score(result.models[0], setting) for result in results]
    rows = np.mean([score.per_row for score in scores], axis=0)
    return Score.from_rows(rows.tolist(), scores[0].unit, results[0].details["seed"])


def table(experiment: Experiment, arms: ArmResults) -> str:
    """Markdown: scores, and paired differences from the arm that the others are compared with."""
    settings = [setting.name for setting in arms[BASE][0].settings]
    reference = {name: mean_score(arms[experiment.versus], name) for name in settings}
    lines = [
        "| arm | " + " | ".join("full cache" if s == "full" else f"keep {s}" for s in settings) + " | seconds |",
        "| --- |" + " ---: |" * (len(settings) + 1),
    ]
    for arm, results in arms.items():
        cells = [_cell(results, name, None if arm == experiment.versus else reference[name]) for name in settings]
        seconds = [training_seconds(run_directory(experiment, arm, seed)) for seed in experiment.seeds]
        known = [s for s in seconds if s is not None]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {np.mean(known):.0f} |" if known else
                     f"| {arm} | " + " | ".join(cells) + " | |")  # fmt: skip
    n, seeds = arms[BASE][0].rows["n"], len(experiment.seeds)
    note = (
        f"{seeds} seeds, n = {n} rows, {arms[BASE][0].metrics[0]}; 95% bootstrap interval over rows in brackets, "
        f"lowest and highest seed in braces. Below: minus {experiment.versus}, paired by row. "
        "Seconds: of one training run."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def _cell(results: Sequence[Results], setting: str, reference: Score | None) -> str:
    score = mean_score(results, setting)
    if score is None:
        return ""
    text = str(score)
    if len(results) > 1:
        seeds = [result.score(result.models[0], setting).value for result in results]
        text += f" {{{min(seeds):.3f}, {max(seeds):.3f}}}"
    if reference is not None:
        difference = paired_difference(score, reference)
        text += f"<br>{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return text


def draw(experiment: Experiment, arms: ArmResults, path: Path) -> None:
    """Score against keep ratio, one line per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    settings = arms[BASE][0].settings
    places = range(len(settings))
    for number, (arm, results) in enumerate(arms.items()):
        scores = [mean_score(results, setting.name) for setting in settings]
        points = [(place, score) for place, score in zip(places, scores, strict=True) if score is not None]
        values = [score.value for _, score in points]
        errors = [[s.value - s.low for _, s in points], [s.high - s.value for _, s in points]]
        axes.errorbar(
            [place + 0.02 * number for place, _ in points], values, errors, label=arm, capsize=2, linewidth=1.6,
            marker="osD^vPX*"[number % 8], linestyle="--" if arm.startswith(BASE) or arm == experiment.versus else "-",
            color=f"C{number}",
        )  # fmt: skip
    axes.set_xticks(list(places), ["full cache", *(setting.name for setting in settings[1:])])
    axes.set_xlabel("kept share of each window")
    axes.set_ylabel(arms[BASE][0].metrics[0])
    axes.grid(axis="y", color="#e4e4e4")
    figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def save(experiment: Experiment, arms: ArmResults) -> Path:
    """Write `experiment.md`, `experiment.json` (every row's score) and `experiment.png`."""
    directory = Path(experiment.output_dir)
    (directory / "experiment.md").write_text(table(experiment, arms), encoding="utf-8")
    values = {"experiment": experiment.model_dump(), "arms": {a: [r.to_dict() for r in rs] for a, rs in arms.items()}}
    (directory / "experiment.json").write_text(json.dumps(values, default=str) + "\n", encoding="utf-8")
    draw(experiment, arms, directory / "experiment.png")
    return directory / "experiment.md"


def save_curves(experiment: Experiment, curves: Curves) -> Path:
    """Write `curves.json` and `curves.png`: score against step, with the compressed and with the full cache."""
    from matplotlib.figure import Figure

    names = [setting.name for setting in curves[BASE][0][0].settings][::-1]
    arms = [arm for arm in curves if arm != BASE]
    lines = {
        arm: {
            name: {step: mean_score(results, name).value for step, results in (curves[BASE] | curves[arm]).items()}
            for name in names
        }
        for arm in arms
    }
    directory = Path(experiment.output_dir)
    values = {"experiment": experiment.model_dump(), "rows": experiment.curve_rows, "scores": lines}
    (directory / "curves.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for number, arm in enumerate(arms):
            axes.plot(
                *zip(*sorted(lines[arm][name].items()), strict=True),
                label=arm if name == names[0] else None, marker="osD^vPX*"[number % 8], markersize=4,
                linestyle="--" if arm == experiment.versus else "-", color=f"C{number}",
            )  # fmt: skip
        axes.set_title("full cache" if name == "full" else f"keep {name}", fontsize=10)
        axes.set_xlabel("training steps")
        axes.grid(axis="y", color="#e4e4e4")
    figure.axes[0].set_ylabel(curves[BASE][0][0].metrics[0])
    figure.legend(frameon=False, loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(directory / "curves.png", dpi=150)
    return directory / "curves.png"
