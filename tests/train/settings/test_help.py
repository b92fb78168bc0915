"""`--help` of every script: every setting of every section with its whole meaning, every option with a text."""

from __future__ import annotations

import importlib
import sys

import pytest

from train.experiments.arms import Experiment
from train.settings.schema import LRSA, SECTIONS

WITH_SETTINGS = ["train", "evaluate", "estimate", "experiment"]
OTHERS = ["publish", "merge", "kept_tokens", "serve", "train_tiny_base"]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """The help of a script in `launch/`, line breaks taken out."""

    def shown(script: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"launch/{script}.py", "--help"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"launch.{script}").main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return shown


def meanings(model, prefix: str = "") -> dict[str, str]:
    found = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        found |= meanings(inner, f"{name}.") if hasattr(inner, "model_fields") else {prefix + name: field.description}
    return found


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_every_setting_is_in_the_help(help_of, script):
    text = " ".join(help_of(script).split())
    for section, model in SECTIONS.items():
        settings = LRSA if section == "lrsa" else meanings(model)
        assert len(settings) >= 1 and f" {section}: " in text
        for name, meaning in settings.items():
            assert meaning.strip(), f"{section}.{name} has no meaning"
            assert f" {name} (" in text and f"): {' '.join(meaning.split())}" in text, f"{section}.{name}"
    assert "--set section.key=value" in text


def test_the_help_of_an_experiment_has_its_own_settings(help_of):
    text = " ".join(help_of("experiment").split())
    for name, meaning in meanings(Experiment).items():
        assert f" {name} (" in text and meaning in text


def test_choices_and_defaults_are_shown(help_of):
    text = " ".join(help_of("train").split())
    assert "attention ('auto'): " in text and "One of auto, reference, native, tiled, cudnn, flex." in text
    assert "lr_scheduler_type ('linear'): " in text and " cosine_with_restarts, " in text
    assert "name_or_path (required): " in text and "skip_layers ([]): " in text and "revision (null): " in text


@pytest.mark.parametrize("script", WITH_SETTINGS + OTHERS)
def test_every_option_has_a_text(help_of, script):
    text = help_of(script)
    options = text.partition("\noptions:\n")[2].partition("\n\n")[0].splitlines()
    named = [index for index, line in enumerate(options) if line.startswith("  -")]
    assert len(named) >= 3, "the options were not read"
    for index in named:
        inline = "  " in options[index].strip()
        below = index + 1 < len(options) and options[index + 1].startswith(" " * 20)
        assert inline or below, options[index]
    assert text.startswith(f"usage: launch/{script}.py ")
