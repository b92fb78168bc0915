"""Compare training settings over seeds: every arm is one configuration with some settings changed, trained once per
seed as by launch/train.py, and all are evaluated on the same rows.

  python launch/experiment.py --config configs/experiments/retrieval.yaml
  python launch/experiment.py --config configs/experiments/retrieval.yaml --jobs 2     # two runs at a time

The same command again resumes: finished runs are kept. The experiment's output_dir then holds one folder per arm and
seed, experiment.md (the table), experiment.png and experiment.json (every row's score); with
curve_rows also curves.png and curves.json, from the checkpoints that the runs kept.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("experiment.py", __doc__, _settings)
    parser.add_argument(
        "--config", required=True, help="a YAML file of an experiment, also looked up in configs/; see below"
    )
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time; on one GPU leave it at 1")
    options = parser.parse_args()

    def job() -> None:
        from train.experiments import report as experiment_report
        from train.experiments.arms import load_experiment, train_arms
        from train.experiments.measure import Scores

        settings = load_experiment(options.config, options.set)
        train_arms(settings, options.jobs)
        scores = Scores(settings)
        arms: dict[str, list] = {}
        for arm, seed, results in scores.arms():
            arms.setdefault(arm, []).append(results)
            print(f"evaluated: {arm}" + ("" if seed is None else f", seed {seed}"), flush=True)
        path = experiment_report.save(settings, arms)
        curves: dict[str, dict[int, list]] = {}
        for arm, _, step, results in scores.checkpoints():
            curves.setdefault(arm, {}).setdefault(step, []).append(results)
        if curves:
            print(f"learning curves: {experiment_report.save_curves(settings, curves)}")
        print(path.read_text(encoding="utf-8"))
        print(f"table: {path}")

    return explain(job)


def _settings() -> str:
    from launch.command_line import run_settings
    from train.experiments.arms import Experiment
    from train.settings.help import settings_help

    return f"an experiment's file, as `name (default): meaning`:\n\n{settings_help(Experiment)}\n{run_settings()}"


if __name__ == "__main__":
    sys.exit(main())
