"""The directory of a run: what it holds, and how a second run treats the first one's results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from data.report import REPORT_NAME, DataReport
from train.adapter import ADAPTER_NAME
from train.resume.checkpoints import STATE, checkpoints
from train.settings.errors import FieldPath, Problem, SettingsError
from train.settings.load import RunSettings, load_settings
from train.settings.paths import PATHS
from train.settings.schema import SECTIONS, TrainSettings
from train.settings.sources import is_part, read_source, shown

CONFIG_NAME = "config.yaml"
PUBLISHED_NAME = "hub"  # what launch/publish.py sent or would send
RESULTS = ("results.json", "report.md", "score_vs_keep_ratio.png", "training_losses.png", "evaluation")  # of an adapter
WRITTEN = (
    *(STATE, ADAPTER_NAME, "adapter_config.json", "lrsa_config.json", "lrsa_prompt.json", "lrsa_base.json"),
    *("log.jsonl", "README.md"),
    *(REPORT_NAME, "data_report.md", *RESULTS, "control"),
    PUBLISHED_NAME,
    CONFIG_NAME,  # last: while it is there, --resume sees which settings belong to what is left
)
LENGTHS = ("max_steps", "num_train_epochs", "max_minutes")  # what the schedule of the learning rate is stretched over
WHEN_MOVED = (
    "what has moved, and is no longer in its old place, is accepted in its new one when the command line names it: "
    "--set model.name_or_path=..., or data.sources.0.path=..."
)
# Settings of `train` that a checkpoint holds, or that order the rows: a change would be ignored, or be half of one.
IN_CHECKPOINTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "packing", "packing_strategy"),
)


def check_run_directory(settings: RunSettings, resume: bool, overwrite: bool) -> list[str]:
    """Refuse to overwrite an earlier run without --overwrite, or to resume one with other settings.

    Returns:
        what the person who resumes a run has to know.

    Raises:
        SettingsError: when the directory holds an adapter or checkpoints and neither flag is given, when `resume` meets
            a run with other settings, apart from eval and those of train that may change, or when files that are not
            those of a run would be overwritten.
    """
    directory = Path(settings.train.output_dir)
    foreign = [] if (directory / CONFIG_NAME).is_file() else [name for name in WRITTEN if (directory / name).exists()]
    if foreign:
        text = (
            f"{shown(directory)} holds {', '.join(foreign)} but no {CONFIG_NAME}, so it is not the directory of "
            "a run, and these files would be overwritten: choose another directory with --set train.output_dir=..., or "
            "move them away"
        )
        raise SettingsError([Problem("", "train.output_dir", text)])
    start = settings.lora.init_from
    if start is not None and Path(start).resolve().is_relative_to(directory.resolve()):
        text = f"{shown(directory)} holds the adapter of lora.init_from, which would be lost: choose another directory"
        raise SettingsError([Problem("", "train.output_dir", text)])
    earlier = directory / ADAPTER_NAME
    if not earlier.is_file():
        earlier = next(reversed(checkpoints(directory)), None)
    if earlier is None or overwrite:
        return []
    if not resume:
        text = (
            f"{shown(directory)} already holds a run ({earlier.name}): continue its last checkpoint with --resume, "
            "replace it with --overwrite, or choose another directory with --set train.output_dir=..."
        )
        raise SettingsError([Problem("", "train.output_dir", text)])
    return _refuse_other_settings(settings, directory)


def changed_rows(directory: Path, report: DataReport) -> str | None:
    """What has changed in the rows since the run in this directory began; None when they are the same, or it is new.

    Rows that were trained on could be held out now.
    """
    path = directory / REPORT_NAME
    if not path.is_file() or not (checkpoints(directory) or (directory / ADAPTER_NAME).is_file()):
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    marks = before.get("fingerprints", {})
    changed = [name for name, mark in marks.items() if mark != report.fingerprints[name]]
    if not changed:
        return None
    rows = f"{before['rows']} + {before['evaluation_rows']}, now {report.rows} + {report.evaluation_rows}"
    names = " and to ".join({"train": "train on", "evaluation": "evaluate on"}[name] for name in changed)
    return (
        f"the rows to {names} are not those of the run in {shown(directory)} ({rows}): files, tokenizer or chat "
        "template have changed"
    )


def results_folders(settings: RunSettings, directory: Path) -> dict[str, Path]:
    """Where the results on each source with held-out rows lie: those on the first one in the directory itself."""
    measured = [name for name, source in settings.data.each().items() if source.eval_rows]
    folders = [directory / "evaluation" / name.replace(" ", "_") for name in measured]
    return dict(zip(measured, [directory, *folders[1:]], strict=True)) if measured else {}


def clear_run_directory(directory: Path) -> None:
    """Delete what an earlier run wrote; other files stay."""
    _remove([*checkpoints(directory), *(directory / name for name in WRITTEN)])


def discard_results(directory: Path) -> None:
    """Delete the results of an adapter that is about to be trained further."""
    _remove([directory / name for name in (*RESULTS, PUBLISHED_NAME)])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_run_directory(directory: Path) -> AcquireReturnProxy:
    """Lock a directory against other runs until the returned context is left, or the process ends.

    Raises:
        SettingsError: when another run uses it, such as one whose launcher was killed.
    """
    try:
        return FileLock(directory / ".lock").acquire(timeout=0)
    except Timeout:
        text = f"another run uses {shown(directory)}: wait for it, end it, or choose another directory"
        raise SettingsError([Problem("", "train.output_dir", text)]) from None


def config_of_run(directory: str) -> str:
    """The settings file that a run left in its directory.

    Raises:
        SettingsError: when the directory is not one of a run.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        text = f"holds no {CONFIG_NAME}, so it is not the directory of a run; use --adapter and --config for an adapter"
        raise SettingsError([Problem("--run", directory, text)])
    return str(path)


def _refuse_other_settings(settings: RunSettings, directory: Path) -> list[str]:
    path = directory / CONFIG_NAME
    try:
        before = load_settings(str(path), [*_moved(path, settings), "train.deepspeed=null"])  # it may change or be gone
    except SettingsError as error:
        text = f"compares with the settings in {shown(path)}: {WHEN_MOVED}"
        raise SettingsError([*error.problems, Problem("", "--resume", text)]) from error
    problems = []
    for section in (name for name in SECTIONS if name not in ("train", "eval")):
        was, now = (_settings(run.to_dict()[section]) for run in (before, settings))
        changed = [name for name in was | now if was.get(name) != now.get(name)]
        problems += [_changed(path, section, name, was.get(name), now.get(name)) for name in changed]
    for name in IN_CHECKPOINTS:
        was, now = getattr(before.train, name, None), getattr(settings.train, name, None)
        problems += [_changed(path, "train", name, was, now)] if was != now else []
    rows, rows_now = (_rows_per_process(train) for train in (before.train, settings.train))
    if rows != rows_now:
        text = (
            f"Per-process batch size changed from {rows} to {rows_now} rows per step: with --resume, "
            "per_device_train_batch_size times gradient_accumulation_steps has to stay what it was"
        )
        problems.append(Problem(shown(path), "train.per_device_train_batch_size", text))
    if problems:
        raise SettingsError(problems)
    changed = [f"train.{name} was {getattr(before.train, name)}, is {getattr(settings.train, name)}"
               for name in LENGTHS if getattr(before.train, name) != getattr(settings.train, name)]  # fmt: skip
    if not changed or settings.train.lr_scheduler_type.startswith("constant"):
        return []
    return [f"{'; '.join(changed)}: from here on the learning rate is that of a run of the new length, and jumps"]


def _moved(path: Path, settings: RunSettings) -> list[str]:
    """Local paths in a run's config.yaml that are gone and that the command line names anew, as overrides."""
    stored, now, overrides = read_source(str(path), []), settings.to_dict(), []
    places = [((section,), names) for section, names in PATHS.items()]
    places += [(("data", "sources", n), PATHS["data"]) for n in range(len(now["data"].get("sources") or []))]
    for place in [(*section, name) for section, names in places for name in names]:
        was = _value(stored.values, place)
        parts = [part for part in (was if isinstance(was, list) else [was]) if isinstance(part, str)]
        local = [part for part in parts if Path(part).is_absolute() or part.startswith(".")]
        gone = any(stored.find(place, part) is None for part in local)
        if gone and is_part(place, settings.from_command_line):
            overrides.append(f"{'.'.join(map(str, place))}={json.dumps(_value(now, place))}")
    return overrides


def _settings(values: dict) -> dict:
    """The settings of a section, those of every source under names such as `sources.0.path`."""
    listed = values.get("sources") or []
    own = {f"sources.{number}.{name}": value for number, one in enumerate(listed) for name, value in one.items()}
    return {name: value for name, value in values.items() if name != "sources"} | own


def _value(values: object, place: FieldPath) -> object:
    """What stands at a place in sections of plain values, None where there is nothing."""
    for part in place:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _changed(path: Path, section: str, name: str, was: object, now: object) -> Problem:
    way = "--resume continues with the same settings only"
    if name.rpartition(".")[2] in PATHS.get(section, ()):
        way += f"; {WHEN_MOVED}"
    return Problem(shown(path), f"{section}.{name}", f"was {was!r} when this run began, is {now!r}: {way}")


def _rows_per_process(train: TrainSettings) -> int:
    """Rows that a process reads for one step of the optimizer."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps
