"""Show which tokens of a text a model keeps, per layer and KV head: a picture and a page of shaded text.

  python launch/kept_tokens.py --model runs/qa --text book.txt --out runs/qa/kept
  python launch/kept_tokens.py --model Qwen/Qwen2.5-0.5B --lag-size 64 --top-k 16 --text book.txt --out runs/kept

The model is an adapter trained with lrsa, a model into which one was merged, or, with --sink-size, --lag-size or
--top-k, any model. One of these three replaces the stored lrsa_config.json as a whole: what is not given is then the
default (16, 128, 32). Writes kept_tokens.png and kept_tokens.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the packages data and train lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("kept_tokens.py", __doc__)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="adapter or model")
    parser.add_argument("--text", required=True, metavar="FILE", help=".txt or .md, or .json and .jsonl with a text")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the picture and the page go")
    parser.add_argument("--start", default="", metavar="WORDS", help="start where these words first occur in the text")
    parser.add_argument("--tokens", type=int, default=512, help="maximum number of tokens to read, 512 by default")
    for name in ("sink-size", "lag-size", "top-k"):
        parser.add_argument(f"--{name}", type=int, help="see above; default: lrsa_config.json of the model")
    options = parser.parse_args()
    return explain(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    import lrsa
    from data.sources.records import read_records
    from lrsa.evaluation.report import kept_tokens as report
    from train.settings.errors import Problem, SettingsError

    given = {name: getattr(options, name) for name in ("sink_size", "lag_size", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    texts = [
        record["text"] for record in read_records(options.text, setting="--text") if options.start in record["text"]
    ]
    if not texts:
        raise SettingsError([Problem("--start", options.start, f"does not occur in {options.text}")])
    try:
        model, tokenizer, _ = lrsa.load(options.model, config=lrsa.LRSAConfig(**given) if given else None)
    except ValueError as error:
        raise SettingsError([Problem("--model", options.model, f"{error}")]) from error
    passage = report.read_passage(tokenizer, texts[0][texts[0].index(options.start) :], options.tokens)
    config = model.config.lrsa
    kept, layers = report.kept_tokens(model, passage.ids), report.holding_layers(model)
    options.out.mkdir(parents=True, exist_ok=True)
    report.draw_kept_tokens(kept, passage.pieces, config, options.out / "kept_tokens.png", layers)
    report.write_page(kept, passage.pieces, config, options.out / "kept_tokens.html")
    print(report.describe(kept, config))
    print(f"wrote {options.out}/kept_tokens.png, kept_tokens.html")


if __name__ == "__main__":
    sys.exit(main())
