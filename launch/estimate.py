"""Predict the memory of a run before it starts, LRSA against dense attention; nothing is loaded but config.json.

  python launch/estimate.py --config qa.yaml --gpus 8
  python launch/estimate.py --config qa.yaml --gpus 8 --device h100 --sp-size 4 --set data.context_length=131072

Nothing is run: the prediction has been checked on a CPU only (docs/scaling.md). The exit status is 0 when the run fits
the device, 3 when it does not, and 2 for a mistake in the settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TOO_LARGE = 3


def main() -> int:
    # As a script, launch/ comes first on the path; the packages train and data lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain, run_settings

    parser = Parser("estimate.py", __doc__, run_settings)
    from train.estimate.devices import DEVICES

    parser.add_argument(
        "--config", required=True, help="a YAML file, also looked up in configs/; .yaml may be left out"
    )
    parser.add_argument("--gpus", type=int, help="devices of the run; by default those of this machine, else 1")
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], help="by default this machine's GPU, else h100")
    parser.add_argument("--sp-size", type=int, help="GPUs per sequence-parallel group, instead of parallel.sp_size")
    parser.add_argument("--zero-stage", type=int, choices=[0, 2, 3], help="instead of the file in train.deepspeed")
    parser.add_argument("--json", metavar="FILE", help="write all numbers into this file as well")
    options = parser.parse_args()
    fitting = []
    status = explain(lambda: fitting.append(estimate(options)))
    return status or (0 if fitting[0] else TOO_LARGE)


def estimate(options: argparse.Namespace) -> bool:
    """Print the prediction; whether the run fits."""
    from rich.console import Console

    from train.estimate.devices import DEVICES, this_device
    from train.estimate.plan import plan_run, shape_from_settings
    from train.estimate.report import fits, print_report, report_dict
    from train.settings.defaults import with_defaults
    from train.settings.load import load_settings

    # A file for DeepSpeed is read below; an installed DeepSpeed or a GPU is not needed.
    settings = load_settings(options.config, options.set)
    import torch

    on_cpu = options.device == "cpu" or (options.device is None and bool(settings.train.use_cpu))
    gpus = options.gpus or (0 if on_cpu else torch.cuda.device_count()) or 1
    if on_cpu or (options.device is None and torch.cuda.is_available()):
        device = this_device(gpus, use_cpu=on_cpu)
    else:
        device = DEVICES[options.device or "h100"]
    settings = with_defaults(settings, use_cpu=device.on_cpu)
    shape = shape_from_settings(settings)
    plan = plan_run(settings, shape, device, gpus, sp_size=options.sp_size, zero_stage=options.zero_stage)
    print_report(Console(), plan)
    if options.json:
        Path(options.json).write_text(json.dumps(report_dict(plan), indent=1) + "\n", encoding="utf-8")
    return fits(plan)


if __name__ == "__main__":
    sys.exit(main())
