"""Evaluate a finished run again, any adapter, or any model: with the full cache and with compressed ones.

  python launch/evaluate.py --run runs/qa
  python launch/evaluate.py --run runs/qa --keep-ratios 1/2,1/8,1/16 --rows 500 --out runs/qa/more-ratios
  python launch/evaluate.py --adapter user/adapter-on-the-hub --config qa.yaml
  python launch/evaluate.py --model user/model-on-the-hub --config qa.yaml --lags 64,128 --layers
  python launch/evaluate.py --run runs/qa --suite long_context

Base model and data come from the run's config.yaml, or from --config; the compression always from the lrsa_config.json
beside the adapter, with top_k changed for each keep ratio (top_k / lag_size). A control (eval.control) is measured too.
--model measures a model without an adapter, before any training: what each keep ratio costs it under the config's
lrsa section, for other lags and other choices of tokens too, and which layers to keep whole (--layers). Which layers
carry a task shows better in a model that was tuned for it, best in a dense control: --run DIR --layers.
Writes report.md, results.json and pictures into --out, by default into the run's directory, where they replace the
earlier ones (and its model card). eval.metric=loss only reads the right answers, which takes the shortest time.
--suite measures long contexts instead: passkeys and other hidden facts over lengths and depths, real questions, the
loss by position, RULER, and LongBench where the Hub is reached; writes suite.md, suite.json and pictures.
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the packages train and data lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain, run_settings
    from train.distributed import environment

    parser = Parser("evaluate.py", __doc__, run_settings)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="DIR", help="directory of a finished run")
    what.add_argument("--adapter", metavar="DIR_OR_HUB_ID", help="an adapter trained with lrsa; needs --config")
    what.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a model without an adapter; needs --config")
    parser.add_argument("--config", help="data for --model, and base model for --adapter; also looked up in configs/")
    parser.add_argument("--lags", type=_list(int), metavar="L,L,...", help="with --model: other values of lag_size")
    parser.add_argument(
        "--scores", type=_list(str), metavar="S,S,...", help="with --model: of lag_relative,recent,random; default all"
    )
    parser.add_argument(
        "--suite", type=_list(str), metavar="T,T,...", help="long_context, or some of its tasks, in place of eval.suite"
    )
    parser.add_argument(
        "--layers", action="store_true", help="choose the layers to keep whole, with --run instead of other scores"
    )
    parser.add_argument(
        "--keep-ratios",
        type=_list(lambda part: float(Fraction(part))),
        metavar="R,R,...",
        help="instead of eval.keep_ratios, as 1/2,0.25",
    )
    parser.add_argument("--rows", type=int, help="maximum number of evaluation rows")
    parser.add_argument("--batch-size", type=int, help="rows per batch")
    parser.add_argument("--out", metavar="DIR", help="where the report goes")
    options = parser.parse_args()
    if not options.run and not options.config:
        parser.error("--adapter and --model need --config, which names the data")
    if not options.model and (options.lags or options.scores):
        parser.error("--lags and --scores are for --model")
    return 0 if environment.rank() else explain(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    import data
    from lrsa.evaluation.measure.controls import SCORES
    from lrsa.evaluation.measure.state import Variant
    from train.evaluation import BASE, evaluate_layers, evaluate_model, evaluate_run, load_base, load_variants, reported
    from train.model import load_tokenizer
    from train.publish.model_card import save_model_card
    from train.resume.run_directory import changed_rows, config_of_run
    from train.settings.defaults import with_defaults
    from train.settings.load import load_settings
    from train.suite import run_suite

    given = {"keep_ratios": options.keep_ratios, "rows": options.rows}
    given |= {"batch_size": options.batch_size, "suite": options.suite}
    overrides = [f"eval.{name}={value}" for name, value in given.items() if value is not None]
    # Nothing is trained: the training machine's DeepSpeed file may be missing on this one.
    overrides = ["train.deepspeed=null", *options.set, *overrides]
    overrides += [f"model.name_or_path={options.model}"] if options.model else []
    settings = with_defaults(load_settings(options.config or config_of_run(options.run), overrides))
    tokenizer = load_tokenizer(settings.model)
    corpus = data.load(settings.data, tokenizer, settings.train.seed, settings.lrsa.dense_length)
    adapter = options.run or options.adapter
    name = adapter if adapter else f"{Path(options.model).name}-untuned"
    out = Path(options.out) if options.out else Path(name) if Path(name).is_dir() else Path("runs") / name
    if options.suite:
        with reported("Lower eval.batch_size."):
            plain = (settings.lrsa, {BASE: Variant(load_base(settings), None)}) if options.model else None
            run_suite(settings, *(plain or load_variants(settings, adapter)), tokenizer, corpus, Console(), out)
        return
    if options.model:
        chosen = {"lags": options.lags or (), "scores": options.scores or tuple(SCORES), "layers": options.layers}
        return evaluate_model(settings, tokenizer, corpus.evaluation, Console(), out, **chosen)
    if options.layers:
        return evaluate_layers(settings, adapter, corpus.evaluation, Console(), out)
    if options.run and (changed := changed_rows(Path(options.run), corpus.report)):
        Console(stderr=True).print(f"warning: {changed}; some rows may have been trained on", style="bold yellow")
    evaluate_run(settings, adapter, tokenizer, corpus.evaluation, Console(), out)
    if options.run:
        corpus.prompt.save_pretrained(options.run)
    if options.run and out == Path(options.run):
        save_model_card(settings, out)


def _list(kind):
    """A parser of values separated by commas."""

    def parse(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")]
        except (ValueError, ZeroDivisionError):
            text = f"write values separated by commas, such as 1/2,0.25 or 64,128, not {text!r}"
            raise argparse.ArgumentTypeError(text) from None

    return parse


if __name__ == "__main__":
    sys.exit(main())
