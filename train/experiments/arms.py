"""Arms x seeds of one configuration: reads and checks an experiment, and trains the runs that are missing.

An arm is a list of settings that differ. Every arm and seed is an ordinary run of launch/train.py in its own folder, so
that an experiment can be resumed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm.auto import tqdm

from lrsa.evaluation.measure.controls import CONTROLS
from train.adapter import ADAPTER_NAME
from train.failures import RunFailed
from train.settings.errors import SettingsError, field_problems
from train.settings.load import RunSettings, load_settings
from train.settings.sources import read_source

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"


class Experiment(BaseModel):
    """A comparison, read from YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = Field(min_length=1, description="configuration that all arms start from")
    output_dir: str = Field(min_length=1, description="where runs, table and pictures go")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, description="train.seed of the runs")
    evaluation_seed: int = Field(
        1000, ge=0, description="seed of the evaluation data; generated rows then differ from the training rows"
    )
    settings: list[str] = Field([], description="section.key=value for all arms")
    arms: dict[str, list[str]] = Field(min_length=1, description="name -> section.key=value of that arm")
    versus: str = Field(description="arm that the others are compared with, on the same rows")
    controls: list[str] = Field(
        ["recent", "random"],
        description="other ways to choose the kept tokens, measured on the base model: the most recent of every "
        "window, random ones",
    )
    curve_rows: int = Field(
        0,
        ge=0,
        description="rows on which the checkpoints of all runs are measured too, for learning curves; train.save_steps "
        "and train.save_total_limit say which there are; 0: no curves",
    )


def load_experiment(path: str, more: list[str] | None = None) -> Experiment:
    """Read and check an experiment; `more` are further settings of all arms.

    Raises:
        SettingsError: listing every problem.
    """
    source = read_source(path, [])
    try:
        experiment = Experiment.model_validate(source.values, strict=True)
    except ValidationError as error:
        wrong = field_problems(error, Experiment, source.values)
        raise SettingsError(source.problems + [source.problem(*item) for item in wrong.items()]) from error
    experiment = experiment.model_copy(update={"settings": [*experiment.settings, *(more or [])]})
    problems = list(source.problems)
    if experiment.versus not in experiment.arms:
        names = ", ".join(experiment.arms)
        problems.append(source.problem(("versus",), f"must be one of the arms {names}, got {experiment.versus!r}"))
    for name in experiment.controls:
        if name not in CONTROLS:
            problems.append(source.problem(("controls",), f"must be of {', '.join(CONTROLS)}, got {name!r}"))
    for arm in experiment.arms:
        if "/" in arm:
            problems.append(source.problem(("arms", arm), f"names folders, so it must have no slash, got {arm!r}"))
    for arm in experiment.arms:  # refuse a mistake before the first arm is trained
        try:
            settings_of(experiment, arm, experiment.seeds[0])
        except SettingsError as error:
            problems += [source.problem(("arms", arm), f"{problem}") for problem in error.problems]
    if problems:
        raise SettingsError(problems)
    return experiment


def settings_of(experiment: Experiment, arm: str, seed: int) -> RunSettings:
    """The settings of one run."""
    return load_settings(experiment.config, overrides(experiment, arm, seed))


def overrides(experiment: Experiment, arm: str, seed: int) -> list[str]:
    """The `--set` values of one run."""
    own = [f"train.seed={seed}", f"train.output_dir={run_directory(experiment, arm, seed)}", "eval.enabled=false"]
    return [*experiment.settings, "eval.control=false", *experiment.arms[arm], *own]


def run_directory(experiment: Experiment, arm: str, seed: int) -> Path:
    return Path(experiment.output_dir) / arm / f"seed-{seed}"


def train_arms(experiment: Experiment, jobs: int) -> None:
    """Train what has no adapter yet, `jobs` runs at a time.

    Raises:
        RunFailed: when a run fails, with the end of what it printed; the others are finished first.
    """
    runs = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    open_runs = [run for run in runs if not (run_directory(experiment, *run) / ADAPTER_NAME).is_file()]
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    failed = []

    def train(run: tuple[str, int]) -> None:
        directory = run_directory(experiment, *run)
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPT), "--config", experiment.config, "--resume", "--set"]
        with open(directory / "output.txt", "w", encoding="utf-8") as file:
            done = subprocess.run(
                [*command, *overrides(experiment, *run)],
                stdout=file, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": threads} | os.environ,
            )  # fmt: skip
        if done.returncode:
            tail = (directory / "output.txt").read_text(encoding="utf-8").splitlines()[-8:]
            failed.append("\n".join([f"The run in {directory} failed:", *tail]))

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), initial=len(runs) - len(open_runs), unit="run") as bar:
        for _ in pool.map(train, open_runs):
            bar.update()
    if failed:
        raise RunFailed("\n".join(failed))


def training_seconds(directory: Path) -> float | None:
    """Wall time of a run's training, from its log."""
    path = directory / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1])["seconds"] if lines else None
