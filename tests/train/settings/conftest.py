"""A right configuration, and a fixture that loads an edited one as a user's file."""

from __future__ import annotations

import pytest

from train.settings.errors import SettingsError
from train.settings.load import RunSettings, load_settings

GOOD = """\
model:
  name_or_path: gpt2
lrsa:
  sink_size: 4
  lag_size: 64
  top_k: 8
lora:
  r: 8
data:
  kind: qa
  path: questions.json
  context_length: 512
train:
  max_steps: 3
  learning_rate: 1e-4
eval:
  rows: 5
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a text as run.yaml where the test runs and loads it; a failure gives the lines of its message."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str, *overrides: str) -> RunSettings | list[str]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        try:
            return load_settings("run.yaml", list(overrides))
        except SettingsError as error:
            return str(error).splitlines()

    return load_text
