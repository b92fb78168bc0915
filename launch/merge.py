"""Merge an adapter into its base model: one folder that needs no peft and loads with lrsa.load in one line.

  python launch/merge.py --adapter runs/qa --out runs/qa-merged
  python launch/merge.py --adapter user/adapter --out merged --dtype bfloat16

The folder holds the weights, lrsa_config.json, lrsa_prompt.json, the tokenizer and a model card. The merged model is
loaded again and its logits are compared with the adapter's in float32: more difference than rounding explains ends with
status 2. An adapter that was trained on a 4-bit or 8-bit base is merged into the full base model. Needs memory for the
model in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("merge.py", __doc__)
    parser.add_argument("--adapter", required=True, metavar="DIR_OR_HUB_ID", help="such as the directory of a run")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; new or empty")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the merged weights; auto, the default: that of the base model",
    )  # fmt: skip
    parser.add_argument("--base-model", metavar="DIR_OR_HUB_ID", help="the base model, when it has moved")
    options = parser.parse_args()

    def job() -> None:
        from train.merge import merge

        error, budget = merge(options.adapter, options.out, options.dtype, options.base_model)
        print(f"logits differ from the adapter's in float32 by {error:.2g} of their size; rounding alone: {budget:.2g}")
        print(f"merged: {options.out}")

    return explain(job)


if __name__ == "__main__":
    sys.exit(main())
