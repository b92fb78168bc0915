"""Train a LoRA adapter for a compressed KV cache, as one YAML file describes it, and evaluate it.

  python launch/train.py --config quickstart.yaml
  deepspeed launch/train.py --config qa.yaml                       # every GPU of this machine
  deepspeed --num_gpus 2 launch/train.py --config qa.yaml --set lrsa.top_k=64 train.output_dir=runs/qa-64

The run's directory (train.output_dir) then holds the adapter with its lrsa_config.json and lrsa_prompt.json, the
settings in use (config.yaml), the log (log.jsonl) and its losses (training_losses.png), a report on the data
(data_report.json), the evaluation (report.md, results.json, score_vs_keep_ratio.png) and a model card (README.md). The
same command again is refused: choose --resume to continue, or --overwrite to start again.

Start a run that may be stopped (a queue, a spot machine) with --resume every time, the first time too. It continues
from the newest complete checkpoint (train.save_steps): a killed run ends with the very same weights as one that was
not. SIGTERM ends it after the current step with a
checkpoint and exit status 75. Under the deepspeed launcher, send the signal to the whole process group
(kill -TERM -- -PGID); the checkpoint must then be written within 30 seconds. Status 2 is a mistake in settings, data
or files, 1 any other failure.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path, where this file would hide the package `train`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain, run_settings

    parser = Parser("train.py", __doc__, run_settings)
    parser.add_argument(
        "--config", required=True, help="a YAML file, also looked up in configs/; .yaml may be left out"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest complete checkpoint in the run's directory, and start from the beginning when "
        "there is none; the setting train.resume_from_checkpoint: auto means the same",
    )
    again.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run in the directory")
    options = parser.parse_args()

    def job() -> None:
        from train.settings.load import load_settings

        settings = load_settings(options.config, options.set)
        from train.run import run

        run(settings, resume=options.resume, overwrite=options.overwrite)

    return explain(job)


if __name__ == "__main__":
    sys.exit(main())
