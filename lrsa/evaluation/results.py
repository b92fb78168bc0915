"""What an evaluation measured: scores of every model at every setting, and the cost of every setting's cache."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from lrsa.config import LRSAConfig
from lrsa.evaluation.measure.cost import LayerCost
from lrsa.evaluation.score import CONFIDENCE, RESAMPLES, Score, paired_difference

FULL = "full"
RESULTS_NAME = "results.json"
PREFILL = {
    "generation": "one forward, compressed after prefill; the last two windows stay dense. In that forward every token "
    "sees only what the compressed cache would still hold, so prefill in chunks gives the same numbers",
    "loss": "one forward in which every token sees only what the compressed cache would still hold, so prefill in "
    "chunks gives the same numbers; the last two windows stay dense",
}

# What `to_dict` writes beside `details`, whose items stand at the top level.
NOT_DETAILS = (
    *("task", "n", "rows", "prefill", "warning", "lrsa", "trained_setting", "interval"),
    *("settings", "cells", "differences", "expected"),
)


@dataclass(frozen=True)
class Setting:
    """A full cache (`config` is `None`) or a compressed one, with the cost of its cache for the longest row."""

    config: LRSAConfig | None
    cost: list[LayerCost]

    @property
    def name(self) -> str:
        """`"full"`, or the keep ratio as a fraction such as `"1/8"`."""
        return FULL if self.config is None else ratio_name(self.config)

    @property
    def keep_ratio(self) -> float:
        return 1.0 if self.config is None else self.config.keep_ratio


@dataclass(frozen=True)
class Cell:
    """One model at one setting.

    Attributes:
        scores: by metric, the headline first.
        answers: generated, in row order; `None` where none were.
        seconds: wall time.
        kept: share of the rows' tokens that the cache still holds when they have been read.
    """

    scores: dict[str, Score]
    answers: list[str] | None
    seconds: float
    kept: float = 1.0


@dataclass(frozen=True)
class Results:
    """The outcome of `compare`.

    Attributes:
        task: `"retrieval"`, `"qa"`, `"chat"` or `"loss"`.
        config: the settings that the models were trained with; its keep ratio is marked as the trained one.
        settings: the full cache first, then falling keep ratios.
        rows: number and lengths of the rows, in their order as `lengths`, and the share of them that is long enough to
            be compressed.
        details: batch size, seed, versions and the like.
        cells: model name -> setting name -> `Cell`.
        expected: the correct answers of every row that was generated (`None` where none were).
    """

    task: str
    config: LRSAConfig
    settings: list[Setting]
    rows: dict
    details: dict
    cells: dict[str, dict[str, Cell]]
    expected: list[list[str]] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the models were trained for compression; `study` measures one that was not."""
        return self.details.get("trained", True)

    @property
    def models(self) -> list[str]:
        return list(self.cells)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics; the first one is drawn and compared."""
        return list(next(iter(next(iter(self.cells.values())).values())).scores)

    @property
    def trained(self) -> str:
        """Name of the setting that the models were trained for."""
        return FULL if self.config.keep_ratio == 1 else ratio_name(self.config)

    @property
    def prefill(self) -> str:
        return PREFILL["loss" if self.task in ("chat", "loss") else "generation"]

    @property
    def warning(self) -> str | None:
        """Set when fewer than 5% of the rows are compressed at all, so that the settings hardly differ."""
        share, longest, limit = self.rows["compressed_share"], self.rows["longest"], self.config.dense_length
        if share >= 0.05:
            return None
        what = "nothing was" if share == 0 else f"only {share:.1%} of the rows were"
        return (
            f"{what} compressed: longest row {longest}, and only rows above sink_size + 2 * lag_size = {limit} are; "
            "lower lrsa.lag_size or use longer data"
        )

    def score(self, model: str, setting: str = FULL, metric: str | None = None) -> Score:
        """One score; `setting` is `"full"` or a keep ratio such as `"1/8"`, `metric` the first one when left out."""
        return self.cells[model][setting].scores[metric or self.metrics[0]]

    def difference(self, a: str, b: str, setting: str = FULL, metric: str | None = None) -> Score:
        """Score of model `a` minus score of model `b` on the same rows, with its own interval."""
        scores = self.score(a, setting, metric), self.score(b, setting, metric)
        return paired_difference(*scores, seed=self.details["seed"])

    @property
    def compared(self) -> list[str]:
        """The metrics that are drawn and of which models are compared: the headline, and the loss beside it."""
        return list(dict.fromkeys((self.metrics[0], *({"loss"} & set(self.metrics)))))

    @cached_property
    def differences(self) -> dict[str, list[tuple[str, dict[str, Score]]]]:
        """By metric: the last model, which a report is about, minus each other one, by setting."""
        *others, last = self.models
        return {
            metric: [
                (other, {s.name: self.difference(last, other, s.name, metric) for s in self.settings})
                for other in others
            ]
            for metric in self.compared
            if others
        }

    def to_dict(self) -> dict:
        """Everything as plain JSON values, the score of every row included."""
        settings = [
            {"name": s.name, "keep_ratio": s.keep_ratio, "lrsa": s.config, "cache": [asdict(layer) for layer in s.cost]}
            for s in self.settings
        ]
        cells = [
            {"model": model, "setting": setting, "seconds": cell.seconds,
             "kept": cell.kept, "answers": cell.answers,
             "scores": {metric: score.to_dict() for metric, score in cell.scores.items()}}
            for model, by_setting in self.cells.items()
            for setting, cell in by_setting.items()
        ]  # fmt: skip
        differences = [
            {"model": self.models[-1], "minus": other, "setting": setting, "metric": metric} | score.to_dict()
            for metric, differences in self.differences.items()
            for other, scores in differences
            for setting, score in scores.items()
        ]
        interval = {"confidence": CONFIDENCE, "method": "percentile bootstrap over rows", "resamples": RESAMPLES}
        return {
            "task": self.task, "n": self.rows["n"], "rows": self.rows, "prefill": self.prefill, "warning": self.warning,
            "lrsa": self.config, "trained_setting": self.trained, "interval": interval, **self.details,
            "settings": settings, "cells": cells, "differences": differences, "expected": self.expected,
        }  # fmt: skip

    def save(self, directory: str | Path) -> Path:
        """Write `results.json` into `directory` (made if missing); `save_report` writes the report as well."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (directory / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> Results:
        """Read back what `save` wrote into `directory`.

        Raises:
            ValueError: when there is no `results.json`, or `save` did not write it.
        """
        path = Path(directory) / RESULTS_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls._from_dict(values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as the results of an evaluation: {error}") from error

    @classmethod
    def _from_dict(cls, values: dict) -> Results:
        settings = [
            Setting(s["lrsa"] and LRSAConfig.from_dict(s["lrsa"]), [LayerCost(**layer) for layer in s["cache"]])
            for s in values["settings"]
        ]
        cells: dict[str, dict[str, Cell]] = {}
        for cell in values["cells"]:
            scores = {name: Score.from_dict(score) for name, score in cell["scores"].items()}
            found = Cell(scores, cell["answers"], cell["seconds"], cell["kept"])
            cells.setdefault(cell["model"], {})[cell["setting"]] = found
        details = {name: value for name, value in values.items() if name not in NOT_DETAILS}
        config = LRSAConfig.from_dict(values["lrsa"])
        return cls(values["task"], config, settings, values["rows"], details, cells, values["expected"])


def ratio_name(config: LRSAConfig) -> str:
    """The keep ratio as people say it: 1/8, 3/4, or 0.305 when no small fraction fits."""
    ratio = Fraction(config.top_k, config.lag_size)
    return str(ratio) if ratio.numerator == 1 or ratio.denominator <= 8 else f"{float(ratio):.3g}"
