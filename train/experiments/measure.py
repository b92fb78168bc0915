"""Evaluates the arms of an experiment on the same rows: base, controls, adapters and their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import PeftModel

import data
from lrsa.config import LRSAConfig
from lrsa.evaluation import Results, Variant, compare
from lrsa.evaluation.measure.controls import CONTROLS
from train.evaluation import BASE, TASKS
from train.experiments.arms import Experiment, run_directory, settings_of
from train.model import load_model, load_tokenizer
from train.resume.checkpoints import checkpoints
from train.settings.errors import Problem, SettingsError
from train.settings.load import load_settings


class Scores:
    """The base model and the rows that everything is measured with."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.settings = load_settings(experiment.config, experiment.settings)
        if self.settings.data.sources:
            text = "an experiment measures one kind of rows: set data.kind and data.path in place of sources"
            raise SettingsError([Problem("", "data.sources", text)])
        model = settings_of(experiment, experiment.versus, experiment.seeds[0]).model
        self.tokenizer = load_tokenizer(model)
        self.base = load_model(model)
        self.adapters: PeftModel | None = None
        self.loaded = 0
        corpus = data.load(
            self.settings.data, self.tokenizer, experiment.evaluation_seed, self.settings.lrsa.dense_length
        )
        self.rows = corpus.evaluation[: self.settings.eval.rows]

    def arms(self) -> Iterator[tuple[str, int | None, Results]]:
        """Base, controls and every adapter: `(arm, seed or None, results)`."""
        lrsa, ratios = self.settings.lrsa, self.settings.eval.keep_ratios
        yield BASE, None, self._base(lrsa, ratios)
        for control in self.experiment.controls:
            yield f"{BASE}, {control}", None, self._base(CONTROLS[control](**lrsa))
        for arm, seed, directory in self._runs():
            yield arm, seed, self._adapter(arm, directory, ratios)

    def checkpoints(self) -> Iterator[tuple[str, int | None, int, Results]]:
        """The base as step 0, then every checkpoint of every run: `(arm, seed, step, results)`."""
        rows = self.experiment.curve_rows
        if not rows:
            return
        yield BASE, None, 0, self._base(self.settings.lrsa, rows=rows)
        for arm, seed, directory in self._runs():
            for path in checkpoints(directory):
                step = int(path.name.rpartition("-")[2])
                yield arm, seed, step, self._adapter(arm, path, rows=rows)

    def _runs(self) -> Iterator[tuple[str, int, Path]]:
        for arm in self.experiment.arms:
            for seed in self.experiment.seeds:
                yield arm, seed, run_directory(self.experiment, arm, seed)

    def _base(self, lrsa: LRSAConfig, ratios: Sequence[float] = (), rows: int | None = None) -> Results:
        model = Variant(self.adapters, None) if self.adapters else self.base  # PEFT changes the base itself
        return self._measure(BASE, model, lrsa, ratios, rows)

    def _adapter(self, arm: str, directory: Path, ratios: Sequence[float] = (), rows: int | None = None) -> Results:
        name = f"adapter{self.loaded}"
        self.loaded += 1
        if self.adapters is None:
            self.adapters = PeftModel.from_pretrained(self.base, directory, adapter_name=name).eval()
        else:
            self.adapters.load_adapter(str(directory), adapter_name=name)
        results = self._measure(arm, Variant(self.adapters, name), self.settings.lrsa, ratios, rows)
        if len(self.adapters.peft_config) > 1:
            self.adapters.delete_adapter(name)
        return results

    def _measure(self, name, model, lrsa: LRSAConfig, ratios: Sequence[float] = (), rows: int | None = None) -> Results:
        settings = self.settings
        return compare(
            {name: model}, self.tokenizer, self.rows[:rows], TASKS[settings.data.kind], lrsa, ratios,
            batch_size=settings.eval.batch_size, max_new_tokens=settings.eval.max_new_tokens,
            seed=self.experiment.evaluation_seed,
        )  # fmt: skip
