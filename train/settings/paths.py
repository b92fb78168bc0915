"""Finds the files and directories that a configuration names, and reports those that are not there."""

from __future__ import annotations

import json

from train.settings.schema import NOT_PARALLEL
from train.settings.sources import Source, find_file, shown

Found = list[tuple[tuple, str]]

WRITTEN_BY_DEEPSPEED = (
    ("tensorboard", "output_path"), ("csv_monitor", "output_path"), ("flops_profiler", "output_file"),
)  # fmt: skip


def with_data_files(source: Source, values: dict) -> dict:
    """`data` with local files found from here, from the configuration's folder or from the repository.

    A path that is not found stays as it is: it may name a data set on the Hub, which only loading can tell.
    """
    result = dict(values)
    for name in ("path", "eval_path"):
        if isinstance(values.get(name), str) and (path := find_file(values[name], source.file)):
            result[name] = str(path)
    return result


def with_model_files(source: Source, values: dict) -> tuple[dict, Found]:
    """`model` with local paths made absolute; a name that can be no Hub id must be a directory."""
    result, problems = dict(values), []
    name, template = values.get("name_or_path"), values.get("chat_template")
    if isinstance(name, str) and name:
        path = find_file(name, source.file)
        if path is not None and path.is_dir():
            result["name_or_path"] = str(path)
            if not (path / "config.json").is_file():
                problems.append((("model", "name_or_path"), f"{shown(path)} holds no config.json, so it is no model"))
        elif path is not None or name.startswith((".", "/", "~")) or name.count("/") > 1:
            problems.append((("model", "name_or_path"), f"no such model directory: {name}"))
    if isinstance(template, str) and template != "none":
        path = find_file(template, source.file)
        if path is None or not path.is_file():
            problems.append((("model", "chat_template"), f"no such file: {template}"))
        else:
            result["chat_template"] = str(path)
    return result, problems


def check_deepspeed(source: Source, train: dict) -> Found:
    """Makes the path of the DeepSpeed file in `train` absolute, and reads it once so that a broken one shows here."""
    name = train.get("deepspeed")
    if isinstance(name, dict):
        return _refused(name, "")
    if not isinstance(name, str):
        return []
    path = find_file(name, source.file)
    if path is None or not path.is_file():
        looked = f"looked here, in {shown(source.file.parent)} and in the repository"
        return [(("train", "deepspeed"), f"no such DeepSpeed file: {name} ({looked})")]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [(("train", "deepspeed"), f"{shown(path)} is not valid JSON: {error}")]
    if not isinstance(content, dict):
        return [(("train", "deepspeed"), f"{shown(path)} must hold a JSON object, got a {type(content).__name__}")]
    train["deepspeed"] = str(path)
    return _refused(content, f"{shown(path)} ")


def _refused(content: dict, where: str) -> Found:
    """What DeepSpeed would set up without the trainer's knowledge, and logs that go to paths of their own: a run writes
    into `train.output_dir` only."""
    found = []
    if content.get("sequence_parallel_size", 1) != 1:
        found.append("sequence_parallel_size has no effect on attention there: set parallel.sp_size")
    if content.get("tensor_parallel"):
        found.append(f"tensor_parallel cannot be set: {NOT_PARALLEL['tp_size']}")
    for section, name in WRITTEN_BY_DEEPSPEED:
        values = content.get(section)
        if isinstance(values, dict) and values.get(name):
            found.append(f"{section}.{name} writes outside train.output_dir, got {values[name]!r}: remove it")
    return [(("train", "deepspeed"), where + text) for text in found]
