"""Keeps local paths and access tokens out of published files.

The rule. A setting that names a local file or directory is published as its path inside the repository
(`configs/deepspeed/zero2.json`) or else as its last name (`questions.json`), and wherever another published text holds
that path, it is replaced in the same way. Access tokens are left out. A text that still contains the working directory,
the repository, the run or the home directory is not published.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from train.settings.errors import Problem
from train.settings.paths import PATHS
from train.settings.sources import REPOSITORY, to_yaml

SECRETS = ("token", "hub_token", "push_to_hub_token", "use_auth_token", "api_key", "password")


class Redaction:
    """The replacements in the texts of one run.

    Args:
        settings: the sections of the run's config.yaml, as plain values.
        base_model: the Hub id that is published for the base model.
        run: the run's directory, which relative paths in its config.yaml are relative to.

    Attributes:
        settings: the sections as they are published.
        replaced: local path -> its replacement.
    """

    def __init__(self, settings: dict, base_model: str, run: Path):
        self.run, self.replaced = run, {}
        self.settings = {section: self._section(section, values) for section, values in settings.items()}
        base = settings["model"]["name_or_path"]
        self.replaced |= {self._absolute(base): base_model} if _is_local(base) else {}
        self.settings["model"]["name_or_path"] = base_model

    def _section(self, section: str, values: dict) -> dict:
        # Free text such as a prompt template may begin with a slash, so only these settings count, and all of train.
        names = [name for name in values if section == "train" or name in PATHS.get(section, ())]
        kept = {name: value for name, value in values.items() if name not in SECRETS}
        kept |= {name: self._public(values[name]) for name in names if name in kept}
        if section == "data" and values.get("sources"):
            kept["sources"] = [self._section("data", source) for source in values["sources"]]
        return kept

    def _public(self, value):
        """A setting without tokens and local paths, however deep they lie in it."""
        if isinstance(value, dict):
            return {name: self._public(inner) for name, inner in value.items() if name not in SECRETS}
        if isinstance(value, list):
            return [self._public(inner) for inner in value]
        if not _is_local(value):
            return value
        return self.replaced.setdefault(self._absolute(value), _public(self._absolute(value)))

    def _absolute(self, path: str) -> str:
        return os.path.abspath(self.run / Path(path).expanduser())

    def config(self) -> str:
        """The published config.yaml."""
        return to_yaml(self.settings)

    def text(self, text: str) -> str:
        """A published text, local paths replaced, longer ones first."""
        for path in sorted(self.replaced, key=len, reverse=True):
            text = re.sub(_pattern(path), lambda _, path=path: self.replaced[path], text)
        return text


def remaining_paths(name: str, text: str, run: Path) -> list[Problem]:
    """One problem for every line of a text that contains a local path."""
    places = {str(place.resolve()) for place in (Path.cwd(), Path.home(), REPOSITORY, run)} - {"/"}
    pattern = re.compile("|".join(map(_pattern, places)))
    return [
        Problem(f"{name}:{number}", "", f"contains a local path, {match[0]}: remove it from the run's {name}")
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]


def _pattern(path: str) -> str:
    """Matches a path and the beginning of a longer one, and no name that only begins or ends alike."""
    return rf"(?<![\w.-]){re.escape(path)}(?![\w.-])"


def _is_local(value: object) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "..")))


def _public(path: str) -> str:
    if Path(path).is_relative_to(REPOSITORY):
        return str(Path(path).relative_to(REPOSITORY))
    return Path(path).name
