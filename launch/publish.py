"""Publish a finished run on the Hugging Face Hub: adapter, compression settings, results and model card, in one commit.

  python launch/publish.py --run runs/qa --repo-id user/name --dry-run      # write the folder, show it, send nothing
  python launch/publish.py --run runs/qa --repo-id user/name                # private, until you change that on the Hub
  python launch/publish.py --run runs/qa --repo-id user/name --base-model Qwen/Qwen2.5-1.5B-Instruct --public

What is sent is first written to the run's hub/ folder. It contains no local path: config.yaml names files by their last
name, or by their path inside this repository. The reports show a few rows of the data, and results.json every answer.
Everything is checked before anything is sent; after a broken upload the same command completes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    # As a script, launch/ comes first on the path; the packages train and data lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from launch.command_line import Parser, explain

    parser = Parser("publish.py", __doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="directory of a finished run")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="where to publish; made if missing")
    parser.add_argument("--base-model", metavar="ORG/NAME", help="Hub name of the base model, if the run's was local")
    parser.add_argument("--license", metavar="ID", help="the Hub's identifier of a licence, such as apache-2.0")
    parser.add_argument("--public", action="store_true", help="make the repository public; private when not given")
    parser.add_argument("--message", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and show it; nothing is sent")
    options = parser.parse_args()
    return explain(lambda: publish(options))


def publish(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi
    from rich.console import Console

    from train.publish.hub import prepare, send
    from train.publish.model_card import CARD_NAME

    console, api = Console(), None if options.dry_run else HfApi()
    publication, folder = prepare(
        options.run,
        options.repo_id,
        api,
        base_model=options.base_model,
        license=options.license,
        public=options.public,
    )
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        console.print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}", highlight=False)
    if options.dry_run:
        console.print((folder / CARD_NAME).read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
        console.print(f"dry run: nothing was sent; the folder is {folder}", soft_wrap=True)
        return
    url = send(publication, folder, options.public, options.message, api)
    seen = "public" if options.public else "private: others need access and a token"
    console.print(f"published, {seen}: {url}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
