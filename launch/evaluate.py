"""Evaluate a finished run again, or any adapter: base and adapter, with the full cache and with compressed ones.

  python launch/evaluate.py --run runs/qa
  python launch/evaluate.py --run runs/qa --keep-ratios 1/2,1/8,1/16 --rows 500 --out runs/qa/more-ratios
  python launch/evaluate.py --adapter user/adapter-on-the-hub --config qa.yaml

Base model and data come from the run's config.yaml, or from --config; the compression always from the lrsa_config.json
beside the adapter, with top_k changed for each keep ratio (top_k / lag_size). A control (eval.control) is measured too.
Writes report.md, results.json and pictures into --out, by default into the run's directory, where they replace the
earlier ones (and its model card).
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the packages train and data lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.distributed import environment

    environment.prepare()
    from launch.command_line import Parser, explain, run_settings

    parser = Parser("evaluate.py", __doc__, run_settings)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="DIR", help="directory of a finished run")
    what.add_argument("--adapter", metavar="DIR_OR_HUB_ID", help="an adapter trained with lrsa; needs --config")
    parser.add_argument("--config", help="base model and data for --adapter; also looked up in configs/")
    parser.add_argument(
        "--keep-ratios", type=_ratios, metavar="R,R,...", help="instead of eval.keep_ratios, as 1/2,0.25"
    )
    parser.add_argument("--rows", type=int, help="maximum number of evaluation rows")
    parser.add_argument("--batch-size", type=int, help="rows per batch")
    parser.add_argument("--out", metavar="DIR", help="where the report goes")
    options = parser.parse_args()
    if options.adapter and not options.config:
        parser.error("--adapter needs --config, which names its base model and the data")
    return 0 if environment.rank() else explain(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    import data
    from train.evaluation import evaluate_run
    from train.model import load_tokenizer
    from train.publish.model_card import save_model_card
    from train.resume.run_directory import changed_rows, config_of_run
    from train.settings.defaults import with_defaults
    from train.settings.load import load_settings

    given = {"keep_ratios": options.keep_ratios, "rows": options.rows, "batch_size": options.batch_size}
    overrides = [f"eval.{name}={value}" for name, value in given.items() if value is not None]
    # Nothing is trained: the training machine's DeepSpeed file may be missing on this one.
    overrides = ["train.deepspeed=null", *options.set, *overrides]
    settings = with_defaults(load_settings(options.config or config_of_run(options.run), overrides))
    tokenizer = load_tokenizer(settings.model)
    corpus = data.load(settings.data, tokenizer, settings.train.seed, settings.lrsa.dense_length)
    adapter = options.run or options.adapter
    out = Path(options.out) if options.out else Path(adapter) if Path(adapter).is_dir() else Path("runs") / adapter
    if options.run and (changed := changed_rows(Path(options.run), corpus.report)):
        Console(stderr=True).print(f"warning: {changed}; some rows may have been trained on", style="bold yellow")
    results = evaluate_run(settings, adapter, tokenizer, corpus.evaluation, Console(), out)
    if options.run:
        corpus.prompt.save_pretrained(options.run)
    if results and options.run and out == Path(options.run):
        save_model_card(settings, out, results)


def _ratios(text: str) -> list[float]:
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"write numbers separated by commas, such as 1/2,0.25, not {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
