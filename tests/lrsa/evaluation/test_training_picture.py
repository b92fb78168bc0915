"""Losses of a training as a picture: every loss of every run in the log, on its panel, with its values."""

import json

import pytest
from matplotlib.figure import Figure

from lrsa.evaluation import draw_training
from train.publish.model_card import save_model_card
from train.settings.load import load_settings

LINES = [
    {"step": 2, "loss": 3.0, "loss_keep_0.125": 4.0, "selection": 1.5, "learning_rate": 0.1},
    {"step": 4, "loss": 2.0, "loss_keep_1": 1.0, "selection": 1.25, "grad_norm": 7.0},
    {"step": 6, "loss": float("nan"), "distillation": 0.5},
    {"step": 6, "train_runtime": 3.5, "train_loss": 2.5},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved while a test runs."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_every_loss_of_every_run_is_drawn(drawn, tmp_path):
    for name, lines in (("a", LINES), ("b", LINES[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    logs = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b", "missing")}
    assert draw_training(logs, tmp_path / "picture.png")
    panels = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in drawn[0].axes
    ]
    kept = {"keep 0.125": ([2], [4.0]), "keep 1": ([4], [1.0])}
    loss = {f"{run}, {name}": points for run in "ab" for name, points in kept.items()}
    assert panels == [
        loss | {"a": ([2, 4], [3.0, 2.0]), "b": ([2, 4], [3.0, 2.0])},
        {"a": ([2, 4], [1.5, 1.25]), "b": ([2, 4], [1.5, 1.25])},
        {"a": ([6], [0.5])},
    ]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_without_a_loss(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "train_loss": 2.5}\n')
    assert not draw_training({"a": tmp_path / "log.jsonl"}, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_report_and_card_of_a_run_show_it(tiny_copy):
    assert (tiny_copy / "training_losses.png").read_bytes().startswith(b"\x89PNG")
    for name in ("report.md", "README.md"):
        assert "](training_losses.png)" in (tiny_copy / name).read_text()
    (tiny_copy / "training_losses.png").unlink()
    save_model_card(load_settings(str(tiny_copy / "config.yaml"), []), tiny_copy)
    assert "training_losses" not in (tiny_copy / "README.md").read_text()
