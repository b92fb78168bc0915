"""Measures a finished run: the base model and its adapters as they lie on disk, with full and compressed caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa import LRSAConfig
from lrsa.evaluation import Variant, compare, draw_training, print_report, save_report
from lrsa.evaluation.layers import choose_layers, save_layers
from lrsa.evaluation.measure.state import with_adapter
from lrsa.evaluation.report.pictures import TRAINING_PICTURE
from lrsa.evaluation.study import save_study, study, summary
from lrsa.loading import attach_adapter, fetch_adapter
from train.adapter import ADAPTER_NAME
from train.failures import RunFailed, first_line, is_out_of_memory
from train.model import is_packed, load_model
from train.resume.run_directory import results_folders
from train.settings.errors import Problem, SettingsError
from train.settings.load import RunSettings

TASKS = {"qa": "qa", "chat": "chat", "text": "loss", "synthetic": "retrieval"}
BASE, CONTROL, TUNED = "base", "dense-LoRA", "LRSA-LoRA"


def evaluate_run(
    settings: RunSettings,
    adapter: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    console: Console,
    out: Path | None = None,
) -> None:
    """Compare base, control (when there is one) and adapter on held-out rows; print the table and write the report.

    Args:
        settings: of the run; `eval` says what is measured, `data.kind` decides the task.
        adapter: directory or Hub id of the adapter, with its lrsa_config.json; the control lies in its `control/`.
        rows: `Corpus.evaluation`.
        out: where results.json, report.md and the picture go; beside the adapter when not given. Of several sources
            the first goes there, each other one into `evaluation/NAME`.

    Raises:
        SettingsError: when there is no adapter, or it does not fit the base model.
        RunFailed: when a batch does not fit the memory.
    """
    if not rows:
        console.print("No evaluation: data.eval_rows is 0, or there were no rows to hold out")
        return
    lrsa, models = load_variants(settings, adapter)
    out = Path(adapter) if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    save_training_losses(Path(adapter), out)
    for task, own, folder in _by_source(settings, rows, out, console):
        with reported(f"The adapter is saved; evaluate it with launch/evaluate.py --run {adapter} --batch-size 1"):
            results = compare(
                models, tokenizer, own, task, lrsa, settings.eval.keep_ratios,
                max_new_tokens=settings.eval.max_new_tokens, metric=settings.eval.metric, **_options(settings),
            )  # fmt: skip
        save_report(results, folder)
        print_report(results, console)
        console.print(f"report: {folder / 'report.md'}")


def _by_source(
    settings: RunSettings, rows: list[dict], out: Path, console: Console
) -> Iterator[tuple[str, list[dict], Path]]:
    """Task, rows and folder of every source that has rows."""
    sources = settings.data.each()
    for name, folder in results_folders(settings, out).items():
        own = [row for row in rows if row.get("source", name) == name][: settings.eval.rows]
        if own:
            if len(sources) > 1:
                console.print(f"Evaluation on {name}:", markup=False)
            folder.mkdir(parents=True, exist_ok=True)
            yield TASKS[sources[name].kind], own, folder


def evaluate_model(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    console: Console,
    out: Path,
    *,
    lags: Sequence[int] = (),
    scores: Sequence[str],
    layers: bool = False,
) -> None:
    """What compression costs the base model on the run's rows, before any training; prints it and writes the report.

    Args:
        lags, scores: as `study` takes them.
        layers: also choose the layers to keep whole (`choose_layers`).

    Raises:
        SettingsError: when a lag, a score or the rows cannot be used.
        RunFailed: when a batch does not fit the memory.
    """
    model = load_base(settings)
    for task, own, folder in _by_source(settings, rows, out, console):
        with reported("Lower eval.batch_size."):
            results = study(
                model, tokenizer, own, task, settings.lrsa, settings.eval.keep_ratios, lags=lags, scores=scores,
                max_new_tokens=settings.eval.max_new_tokens, metric=settings.eval.metric, **_options(settings),
            )  # fmt: skip
            save_study(results, folder)
            print_report(results, console)
            console.print(summary(results).replace("**", ""), soft_wrap=True, markup=False)
            if layers:
                _choose_layers(settings, model, own, settings.lrsa, console, folder)
        console.print(f"report: {folder / 'report.md'}")


def evaluate_layers(settings: RunSettings, adapter: str | Path, rows: list[dict], console: Console, out: Path) -> None:
    """Choose the layers to keep whole with a run's adapter, or its control where there is one: that a layer was whole
    or compressed in training must not decide.

    Raises:
        SettingsError, RunFailed: as `evaluate_model`.
    """
    lrsa, models = load_variants(settings, adapter)
    variant = models.get(CONTROL, models[TUNED])
    _, own, folder = next(_by_source(settings, rows, out, console))
    with reported("Lower eval.batch_size."), with_adapter(variant):
        _choose_layers(settings, variant.model, own, lrsa.replace(skip_layers=()), console, folder)


def _choose_layers(
    settings: RunSettings, model, rows: list[dict], lrsa: LRSAConfig, console: Console, out: Path
) -> None:
    choice = choose_layers(model, rows, lrsa, **_options(settings))
    save_layers(choice, out)
    console.print(choice.summary().replace("**", ""), soft_wrap=True, markup=False)
    console.print(f"layers: {out / 'layers.md'}")


@contextmanager
def reported(advice: str) -> Iterator[None]:
    """What cannot be measured as a message to the person who asked; `advice` follows on memory that is too small."""
    try:
        yield
    except ValueError as error:
        raise SettingsError([Problem("", "evaluation", str(error))]) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(f"Out of memory in the evaluation: {first_line(error)}. {advice}") from error


def _options(settings: RunSettings) -> dict:
    progress = not settings.train.disable_tqdm
    return {"batch_size": settings.eval.batch_size, "seed": settings.train.seed, "progress": progress}


def load_base(settings: RunSettings) -> PreTrainedModel:
    """The base model where it is measured."""
    model = load_model(settings.model).eval()
    model.lrsa_impl = settings.model.attention  # see `with_attention`
    if is_packed(model):  # it is where it was quantised
        return model
    return model.to("cuda" if torch.cuda.is_available() and not settings.train.use_cpu else "cpu")


def save_training_losses(run: Path, out: Path) -> None:
    """Draw the losses in the logs of a run's adapter and its control, when there are any, into `out`."""
    logs = {TUNED: run / "log.jsonl", CONTROL: run / "control" / "log.jsonl"}
    draw_training(logs, out / TRAINING_PICTURE)


def load_variants(settings: RunSettings, adapter: str | Path) -> tuple[LRSAConfig, dict[str, Variant]]:
    """The adapter's compression, and base, control and adapter as variants of one model: weights are loaded once."""
    base = load_base(settings)
    try:
        directory = fetch_adapter(str(adapter), {})
        if directory is None:
            raise ValueError("it holds no adapter_config.json")
        lrsa = LRSAConfig.from_pretrained(directory)
        model = attach_adapter(base, directory, TUNED)
        models, control = {BASE: Variant(model, None)}, directory / "control"
        if (control / ADAPTER_NAME).is_file():
            attach_adapter(model, control, CONTROL)
            models[CONTROL] = Variant(model, CONTROL)
    except (OSError, ValueError, RuntimeError) as error:
        text = f"cannot be loaded as an adapter of {settings.model.name_or_path}: {error}"
        raise SettingsError([Problem("", str(adapter), text)]) from error
    model.eval()
    return lrsa, models | {TUNED: Variant(model, TUNED)}
