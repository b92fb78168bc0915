"""Finds the files and directories that a configuration names, and reports those that are not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from data.sources.records import has_splits, has_subsets
from train.settings.errors import FieldPath
from train.settings.schema import ParallelSettings
from train.settings.sources import Source, shown

# Settings that may name a local file or directory. `train.output_dir` is none of them: a run makes it where it starts.
PATHS = {"model": ("name_or_path", "chat_template"), "lora": ("init_from",), "data": ("path", "eval_path"),
         "train": ("deepspeed",)}  # fmt: skip
WRITTEN_BY_DEEPSPEED = (
    ("tensorboard", "output_path"), ("csv_monitor", "output_path"), ("flops_profiler", "output_file"),
)  # fmt: skip


def relative_to(values: dict[str, dict], folder: Path) -> dict[str, dict]:
    """The sections with their local paths as seen from `folder`, where both lie below the working directory: a project
    that is moved as a whole stays as it is. Other paths stay absolute."""
    here, folder = Path.cwd().resolve(), folder.resolve()
    if not folder.is_relative_to(here):
        return values
    result = {section: dict(settings) for section, settings in values.items()}
    for section, names in PATHS.items():
        for settings in (result[section], *(result[section].get("sources") or [])):
            for name in names:
                settings[name] = _each(settings.get(name), lambda path: _relative_path(path, here, folder))
    return result


def _relative_path(path: str, here: Path, folder: Path) -> str:
    inside = Path(path).is_absolute() and Path(path).resolve().is_relative_to(here)
    return Path(os.path.relpath(Path(path).resolve(), folder)).as_posix() if inside else path


def _each(value, change: Callable[[str], str]):
    """A setting that may be one path or a list of them, every path changed."""
    if isinstance(value, list):
        return [_each(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def with_data_files(source: Source, values: dict, place: FieldPath = ("data",)) -> dict:
    """`data` with local paths made absolute.

    A path that is not found stays as it is: it may name a data set on the Hub, which only loading can tell.
    """
    result, listed = dict(values), values.get("sources")
    for name in PATHS["data"]:
        if name in values:
            result[name] = _each(values[name], lambda path, name=name: str(source.find((*place, name), path) or path))
    evaluated = "eval_path" if result.get("eval_path") else "path"
    for name, of, having in (
        ("name", "path", has_subsets), ("split", "path", has_splits), ("eval_split", evaluated, has_splits)
    ):  # fmt: skip
        paths = result.get(of) if isinstance(result.get(of), list) else [result.get(of)]
        if not any(having(path) for path in paths if isinstance(path, str)):
            _replaced(source, result, place, of, name)
    if isinstance(listed, list):
        result["sources"] = [
            with_data_files(source, one, (*place, "sources", number)) if isinstance(one, dict) else one
            for number, one in enumerate(listed)
        ]
    return result


def _replaced(source: Source, values: dict, place: FieldPath, of: str, name: str) -> None:
    """Leave out the file's setting `name` where the command line replaces what it is about, the setting `of`."""
    if (*place, of) in source.from_command_line and (*place, name) not in source.from_command_line:
        values.pop(name, None)


def with_model_files(source: Source, values: dict, problems: dict[FieldPath, str]) -> dict:
    """`model` with local paths made absolute; a name that can be no Hub id must be a directory."""
    result = dict(values)
    name, template = values.get("name_or_path"), values.get("chat_template")
    if isinstance(name, str) and name:
        path = source.find(("model", "name_or_path"), name)
        if path is not None and path.is_dir():
            result["name_or_path"] = str(path)
            _replaced(source, result, ("model",), "name_or_path", "revision")
            file = values.get("gguf_file")
            if not isinstance(file, str) and not (path / "config.json").is_file():
                problems["model", "name_or_path"] = f"{shown(path)} holds no config.json, so it is no model"
            elif isinstance(file, str) and not (path / file).is_file():
                problems["model", "gguf_file"] = f"{shown(path)} holds no {file}"
        elif path is not None or name.startswith((".", "/", "~")) or name.count("/") > 1:
            problems["model", "name_or_path"] = f"no such model directory: {name}"
    if isinstance(template, str) and template != "none":
        path = source.find(("model", "chat_template"), template)
        if path is not None and path.is_file():
            result["chat_template"] = str(path)
        else:
            problems["model", "chat_template"] = f"no such file: {template}"
    return result


def with_adapter_files(source: Source, values: dict, problems: dict[FieldPath, str]) -> dict:
    """`lora` with a local adapter's path made absolute; a name that can be no Hub id must be a directory."""
    name = values.get("init_from")
    path = source.find(("lora", "init_from"), name) if isinstance(name, str) and name else None
    if path is not None and path.is_dir():
        return values | {"init_from": str(path)}
    if isinstance(name, str) and (path is not None or name.startswith((".", "/", "~")) or name.count("/") != 1):
        problems["lora", "init_from"] = f"no such directory of an adapter: {name}"
    return values


def check_deepspeed(source: Source, values: dict, problems: dict[FieldPath, str]) -> dict:
    """`train` with the path of the DeepSpeed file made absolute; the file is read once, so that a broken one shows."""
    name, where = values.get("deepspeed"), ""
    if not isinstance(name, str | dict):
        return values
    content = name
    if isinstance(name, str):
        path = source.find(("train", "deepspeed"), name)
        if path is None or not path.is_file():
            looked = f"looked here, in {shown(source.file.parent)} and in the repository"
            problems["train", "deepspeed"] = f"no such DeepSpeed file: {name} ({looked})"
            return values
        values, where = values | {"deepspeed": str(path)}, f"{shown(path)} "
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems["train", "deepspeed"] = f"{where}is not valid JSON: {error}"
            return values
        if not isinstance(content, dict):
            text = f"{where}must hold a JSON object, got a {type(content).__name__}"
            problems["train", "deepspeed"] = text
            return values
    if refused := _refused(content):
        problems["train", "deepspeed"] = "; ".join(where + text for text in refused)
    return values


def _refused(content: dict) -> list[str]:
    """What DeepSpeed would set up without the trainer's knowledge, and logs that go to paths of their own: a run writes
    into `train.output_dir` only."""
    refused = []
    if content.get("sequence_parallel_size", 1) != 1:
        refused.append("sequence_parallel_size has no effect on attention there: set parallel.sp_size")
    if content.get("tensor_parallel"):
        refused.append(f"tensor_parallel cannot be set: {ParallelSettings.not_here['tp_size']}")
    for section, name in WRITTEN_BY_DEEPSPEED:
        values = content.get(section)
        if isinstance(values, dict) and values.get(name):
            refused.append(f"{section}.{name} writes outside train.output_dir, got {values[name]!r}: remove it")
    return refused
