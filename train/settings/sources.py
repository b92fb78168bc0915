"""Where a configuration comes from: one YAML file and `--set` overrides, merged, with the place of every value."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from train.settings.errors import Problem, SettingsError
from train.settings.yaml_lines import FieldPath, parse

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

    def where(self, path: FieldPath) -> str:
        """`--set`, or `file:line` of the field or of the nearest section above it that was written."""
        above = [path[:length] for length in range(len(path), 0, -1)]
        if any(part in self.from_command_line for part in above):
            return "--set"
        for part in above:
            if part in self.lines:
                return f"{shown(self.file)}:{self.lines[part]}"
            if any(written[: len(part)] == part for written in self.from_command_line):
                return "--set"
        return shown(self.file)

    def order(self, problem_path: FieldPath) -> tuple[int, int]:
        """Sort key: problems of the file by line, then those of the command line."""
        where = self.where(problem_path)
        if where == "--set":
            return (1, 0)
        line = where.rpartition(":")[2]
        return (0, int(line) if line.isdigit() else 0)


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
    parsed = parse(text)
    source.lines = parsed.lines
    syntax = [Problem(f"{shown(source.file)}:{line}", "", text) for line, path, text in parsed.problems if not path]
    if syntax:
        raise SettingsError(syntax)
    source.problems = [
        Problem(f"{shown(source.file)}:{line}", ".".join(map(str, path)), text) for line, path, text in parsed.problems
    ]
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


def find_file(name: str, config: Path) -> Path | None:
    """An existing path for a name in a configuration: seen from here, from its file, or from the repository.

    From the repository's configs/ as well, so that a copy of a file there finds what lies beside the original.
    """
    for base in (Path.cwd(), config.resolve().parent, REPOSITORY, REPOSITORY / "configs"):
        path = base / Path(name).expanduser()
        if path.exists():
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
    if parsed.problems:
        source.problems.append(Problem("--set", name, parsed.problems[0][2]))
        return
    target = source.values
    for part in path[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[path[-1]] = parsed.values
    source.from_command_line.add(path)
