"""Judge every causal LM family of the installed transformers: `python -m tests.lrsa.models.sweep`.

A tiny random model of each is right (all of `checks` hold), refused (by `apply_lrsa`, in an error that names the
model), not judged (no tiny model of it can be made or run here), or fails. Whatever fails, or is not judged and not
among `UNJUDGED`, makes the command exit 1. The table goes into docs/models.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lrsa import apply_lrsa
from tests.lrsa.models import checks, images
from tests.lrsa.models.build import build
from tests.lrsa.models.families import IMAGE, TEXT, UNJUDGED, cases

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
MARKERS = ("<!-- made by `make models` -->\n", "\n<!-- end -->")
SECONDS = 240  # for one family
STANDS_IN = "another encoder of images for timm's"
KINDS = ("works", "refused", "not judged", "fails")


@dataclass
class Verdict:
    """What became of a family.

    Attributes:
        verdict: one of `KINDS`; why: a remark, the refusal, or what is wrong.
    """

    family: str
    variant: str
    model: str
    verdict: str
    why: str
    seconds: float = 0.0


def judge(family: str, variant: str, options: dict, which=tuple(checks.CHECKS)) -> Verdict:
    """Build a tiny model of a family and check it."""
    start, sees = time.monotonic(), variant in (TEXT, IMAGE)
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if sees else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name, make = names[family], images.build if sees else build

    def verdict(kind: str, why: str) -> Verdict:
        return Verdict(family, variant, name, kind, why, round(time.monotonic() - start, 1))

    try:
        model = make(family, **options)
    except Exception as error:
        try:
            refusal = refused_unbuilt(family, AutoModelForImageTextToText if sees else AutoModelForCausalLM)
        except Exception:  # transformers lists it, and cannot make one either
            refusal = ""
        return verdict("refused", refusal) if refusal else verdict("not judged", _short(error))
    name = type(model).__name__
    try:
        subject = images.subject_with_an_image(model) if variant == IMAGE else checks.Subject(model)
    except Exception as error:
        subject, broken = None, error
    try:
        apply_lrsa(model, checks.CONFIG)
    except ValueError as error:
        named = name in str(error)
        return verdict("refused", str(error)) if named else verdict("fails", f"a refusal without its name: {error}")
    except Exception as error:
        return verdict("fails", f"apply_lrsa: {_short(error)}")
    if subject is None:
        return verdict("not judged", _short(broken))
    subject.model = make(family, **options)
    notes = [STANDS_IN] if family in images.STAND_INS else []
    for check in which:
        try:
            notes.append(check(subject))
        except Exception as error:
            if variant == IMAGE and str(error).startswith("lrsa does not support an image"):
                return verdict("refused", str(error))
            return verdict("fails", f"{check.__name__}: {_short(error)}")
    return verdict("works", checks.remarks(notes))


def refused_unbuilt(family: str, auto: type) -> str:
    """What `apply_lrsa` says to a model of a family that cannot be made tiny, without memory for its weights."""
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[family]())
    try:
        apply_lrsa(model, checks.CONFIG)
    except ValueError as error:
        return str(error) if type(model).__name__ in str(error) else ""
    return ""


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}")[:300]


@contextlib.contextmanager
def limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="only these; nothing is written then")
    parser.add_argument("--json", type=Path, help="append every verdict to this file, and skip those that it holds")
    parser.add_argument("--share", default="0/1", help="of all cases every n-th, from the i-th on, as i/n")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    first, step = map(int, options.share.split("/"))
    verdicts = []
    if options.json and options.json.exists():
        verdicts = [Verdict(**json.loads(line)) for line in options.json.read_text().splitlines()]
    done = {(verdict.family, verdict.variant) for verdict in verdicts}
    for family, variant, choice in cases()[first::step]:
        if (family, variant) in done or (options.families and family not in options.families):
            continue
        try:
            with limit(SECONDS):
                verdict = judge(family, variant, choice)
        except TimeoutError as error:
            verdict = Verdict(family, variant, "", "fails", str(error))
        verdicts.append(verdict)
        print(
            f"{verdict.family:26} {verdict.variant:24} {verdict.verdict:8} {verdict.seconds:5} {verdict.why}"[:260],
            flush=True,
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
    counts = Counter(verdict.verdict for verdict in verdicts)
    print(", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    if not options.families and step == 1:
        write(verdicts)
    unjudged = {(v.family, v.variant): v.why for v in verdicts if v.verdict == "not judged"}
    unknown = [f"{' '.join(case)}: {why}" for case, why in unjudged.items() if case not in UNJUDGED]
    for name in unknown:
        print(f"not judged: {name}")
    return int(counts["fails"] > 0 or bool(unknown))


def write(verdicts: list[Verdict]) -> None:
    """Put the table into docs/models.md, between its markers."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    lines = [
        f"With transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
        + f", of {len({v.family for v in verdicts})} families.",
        "",
        "| family | variant | class | | |",
        "|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        why = verdict.why.replace("|", "\\|")
        lines.append(f"| {verdict.family} | {verdict.variant} | {verdict.model} | {verdict.verdict} | {why} |")
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    DOCUMENT.write_text(before + MARKERS[0] + "\n".join(lines) + MARKERS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
