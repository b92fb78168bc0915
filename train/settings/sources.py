"""Where a configuration comes from: one YAML file and `--set` overrides, merged, with the place of every value.

Scalars follow YAML 1.2: `1e-4` is a number and `no` is text. Dates stay text.
"""

from __future__ import annotations

import io
import os
from collections.abc import Set
from dataclasses import dataclass, field
from glob import has_magic, iglob
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from train.settings.errors import FieldPath, Problem, SettingsError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Source:
    """Merged values and, for every path, whether the file or the command line set it."""

    file: Path
    values: dict = field(default_factory=dict)
    lines: dict[FieldPath, int] = field(default_factory=dict)
    from_command_line: set[FieldPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: FieldPath, text: str) -> Problem:
        return Problem(self.where(path), ".".join(str(part) for part in path), text)

    def find(self, place: FieldPath, name: str) -> Path | None:
        """The file or directory that the setting at `place` names, None when there is none: seen from the
        configuration's folder (for `--set` from here), from here, or from the repository."""
        here = [Path.cwd(), self.file.resolve().parent]
        return find_file(name, here if is_part(place, self.from_command_line) else here[::-1])

    def where(self, path: FieldPath) -> str:
        """`--set`, or `file:line` of the field or of the nearest section above it that was written."""
        line = self._line(path)
        return "--set" if line is None else f"{shown(self.file)}:{line}" if line else shown(self.file)

    def order(self, path: FieldPath) -> tuple[bool, int]:
        """Sort key: problems of the file by line, then those of the command line."""
        line = self._line(path)
        return line is None, line or 0

    def _line(self, path: FieldPath) -> int | None:
        """The line of a field, 0 where nothing of it was written, None on the command line."""
        if is_part(path, self.from_command_line):
            return None
        above = [path[:length] for length in range(len(path), 0, -1)]
        for part in above:
            if part in self.lines:
                return self.lines[part]
            if any(written[: len(part)] == part for written in self.from_command_line):
                return None
        return 0


def is_part(path: FieldPath, written: Set[FieldPath]) -> bool:
    """Whether a field, or a section or list that it is in, is one of those that were written."""
    return any(path[:length] in written for length in range(1, len(path) + 1))


def read_source(config: str, overrides: list[str]) -> Source:
    """Read `config` (also looked up in `configs/`) and lay `overrides` (`section.key=value`) over it.

    Raises:
        SettingsError: when there is no such file, or it is not a mapping of sections in valid YAML.
    """
    source = Source(find_config(config))
    try:
        text = source.file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([Problem(shown(source.file), "", f"cannot be read: {error}")]) from error
    where = shown(source.file)
    parsed = parse(text)
    source.lines = parsed.lines
    if parsed.broken:
        raise SettingsError([Problem(f"{where}:{line}", "", text) for line, text in parsed.broken])
    source.problems = [Problem(f"{where}:{line}", ".".join(map(str, path)), text) for line, path, text in parsed.twice]
    if not isinstance(parsed.values, dict):
        got = "an empty file" if parsed.values is None else f"a {type(parsed.values).__name__}"
        text = f"must hold sections such as model, lrsa and data, got {got}"
        raise SettingsError([Problem(shown(source.file), "", text)])
    source.values = parsed.values
    for override in overrides:
        _apply_override(source, override)
    return source


def find_config(config: str) -> Path:
    """The configuration file: as given, with `.yaml` added, or in the repository's `configs/`."""
    given = Path(config).expanduser()
    candidates = [given, given.with_name(given.name + ".yaml")]
    candidates += [REPOSITORY / "configs" / candidate for candidate in candidates]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml")))
    text = f"no such configuration file, neither here nor in configs/ (which holds {known or 'none'})"
    raise SettingsError([Problem("--config", config, text)])


def find_file(name: str, folders: list[Path]) -> Path | None:
    """An existing path for a name in a configuration, in one of `folders` or in the repository; a pattern stays one.

    In the repository's configs/ as well, so that a copy of a file there finds what lies beside the original.
    """
    for base in (*folders, REPOSITORY, REPOSITORY / "configs"):
        path = base / Path(name).expanduser()
        if path.exists() or (has_magic(name) and any(iglob(str(path), recursive=True))):
            return Path(os.path.abspath(path))
    return None


def shown(path: Path) -> str:
    """A path as a person would write it: relative when it lies below the working directory."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _apply_override(source: Source, override: str) -> None:
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or len(path) < 2 or not all(path):
        source.problems.append(Problem("--set", override, "write it as section.key=value, such as lrsa.top_k=64"))
        return
    parsed = parse(text)
    if told := [text for _, text in parsed.broken] + [text for *_, text in parsed.twice]:
        source.problems.append(Problem("--set", name, told[0]))
        return
    target, place = source.values, ()
    for part, last in zip(path, [*[False] * (len(path) - 1), True], strict=True):
        listed = isinstance(target, list)
        if listed and not (part.isdecimal() and int(part) < len(target)):
            text = f"{'.'.join(map(str, place))} is a list: write a number from 0 to {len(target) - 1}, got {part}"
            source.problems.append(Problem("--set", name, text))
            return
        part = int(part) if listed else part
        place += (part,)
        if last:
            target[part] = parsed.values
        elif not isinstance(target[part] if listed else target.get(part), dict | list):
            target[part] = {}
        target = target[part]
    source.from_command_line.add(place)


@dataclass
class YamlText:
    """Plain values and the line, from 1, of every field by its path.

    Attributes:
        broken: `(line, text)` of what keeps the text from being read.
        twice: `(line, path, text)` of keys that are written twice.
    """

    values: Any = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    broken: list[tuple[int, str]] = field(default_factory=list)
    twice: list[tuple[int, FieldPath, str]] = field(default_factory=list)


class _Constructor(SafeConstructor):
    """Plain values only, whatever tags a text holds."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse(text: str) -> YamlText:
    """Read YAML without making objects of its tags."""
    result = YamlText()
    try:
        if (node := _yaml().compose(text)) is not None:
            _note_lines(node, (), result)
            result.values = _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        tab = line[: mark.column + 1].strip(" ") == "\t" if mark else False
        reason = "a tab cannot start a token; indent with spaces" if tab else error.problem or error.context
        result.broken = [(mark.line + 1 if mark else 1, f"not valid YAML: {reason}")]
    except (YAMLError, ValueError, RecursionError) as error:
        result.broken = [(1, f"not valid YAML: {' '.join(str(error).split())}")]
    return result


def to_yaml(values: dict) -> str:
    """Plain values as a text that `parse` reads back."""
    yaml, stream = _yaml(), io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.allow_duplicate_keys = True  # all are told at once, by `_note_lines`
    yaml.default_flow_style = yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    return yaml


def _note_lines(node: Node, path: FieldPath, result: YamlText) -> None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            name, line = (*path, str(key.value)), key.start_mark.line + 1
            if name in result.lines and key.value != "<<":
                result.twice.append((line, name, f"written twice, first on line {result.lines[name]}; keep one"))
            result.lines.setdefault(name, line)
            _note_lines(value, name, result)
    elif isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            result.lines[(*path, index)] = item.start_mark.line + 1
            _note_lines(item, (*path, index), result)
