"""An experiment of two arms through the real command line: it goes on where it stopped, on the same rows for all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.tiny_run import launch_here, make_workplace
from train.experiments.arms import load_experiment, settings_of
from train.settings.errors import SettingsError
from train.settings.sources import to_yaml

ARMS = {
    "default": [],
    "dense": ["lrsa.top_k=8", "objective.cross_entropy=1", "objective.distillation=0"],
}
EXPERIMENT = {
    "config": "run.yaml", "output_dir": "runs/compared", "seeds": [3], "arms": ARMS, "versus": "dense",
    "settings": [
        "train.max_steps=2", "train.disable_tqdm=true", "eval.enabled=true",
        "train.save_strategy=steps", "train.save_steps=1",
    ],
    "controls": ["recent"], "curve_rows": 3,
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.chdir(make_workplace(tmp_path, byte_tokenizer))
    (tmp_path / "compare.yaml").write_text(to_yaml(EXPERIMENT))
    return tmp_path


def test_arms_are_trained_once_and_compared_row_by_row(workplace):
    command = ["launch/experiment.py", "--config", "compare.yaml", "--jobs", "2"]
    done = launch_here(workplace, *command)
    assert done.returncode == 0, done.stderr
    directory = workplace / "runs" / "compared"
    adapters = {arm: directory / arm / "seed-3" / "adapter_model.safetensors" for arm in ARMS}
    before = {arm: path.stat().st_mtime_ns for arm, path in adapters.items()}
    table = (directory / "experiment.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:6]] == ["base", "base, recent", *ARMS]
    assert "<br>" in table.splitlines()[4] and "<br>" not in table.splitlines()[5], "dense is what others differ from"
    found = json.loads((directory / "experiment.json").read_text())["arms"]
    scores = {arm: [cell["scores"]["loss"]["per_row"] for cell in runs[0]["cells"]] for arm, runs in found.items()}
    assert len(scores["default"]) == 3 and len(scores["base, recent"]) == 2
    assert scores["base"][0] == scores["base, recent"][0], "the full cache is the same however tokens are chosen"
    assert scores["base"][-1] != scores["base, recent"][-1] and scores["default"] != scores["dense"]
    assert (directory / "experiment.png").stat().st_size > 5000
    curves = json.loads((directory / "curves.json").read_text())["scores"]
    assert list(curves) == list(ARMS) and list(curves["default"]["full"]) == ["0", "1", "2"]
    assert curves["default"]["full"]["0"] == curves["dense"]["full"]["0"] != curves["default"]["full"]["2"]
    assert curves["default"]["full"]["1"] != curves["default"]["full"]["2"]
    assert curves["default"]["full"]["0"] == pytest.approx(np.mean(scores["base"][0][:3]), abs=1e-9)
    assert (directory / "curves.png").stat().st_size > 5000

    adapters["dense"].unlink()
    assert launch_here(workplace, *command).returncode == 0
    assert adapters["default"].stat().st_mtime_ns == before["default"], "a finished run is not trained again"
    assert adapters["dense"].is_file()


def test_a_run_that_fails_is_told_with_what_it_printed(workplace):
    (workplace / "held_out.jsonl").write_text("no json\n")
    (workplace / "compare.yaml").write_text(to_yaml(EXPERIMENT | {"arms": {"dense": ARMS["dense"]}}))
    done = launch_here(workplace, "launch/experiment.py", "--config", "compare.yaml")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "runs/compared/dense/seed-3" in done.stderr and "held_out.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versus": "full"}, "versus must be one of the arms default, dense, got 'full'"),
        ({"controls": ["newest"]}, "controls must be of recent, random, got 'newest'"),
        ({"arms": ARMS | {"at 1/4": []}}, "must have no slash, got 'at 1/4'"),
        ({"seeds": []}, "seeds"),
        ({"sedes": [1]}, "sedes"),
        ({"arms": {"dense": ["lrsa.top_k=9"]}}, "top_k must be between 1 and lag_size (8), got 9"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(workplace, change, message):
    (workplace / "compare.yaml").write_text(to_yaml(EXPERIMENT | change))
    with pytest.raises(SettingsError) as error:
        load_experiment("compare.yaml")
    assert message in str(error.value)


def test_an_arm_written_twice_is_told_with_its_line(workplace):
    text = (workplace / "compare.yaml").read_text()
    (workplace / "compare.yaml").write_text(text.replace("arms:\n", "arms:\n  dense: [lora.r=2]\n"))
    with pytest.raises(SettingsError, match=r"compare.yaml:\d+ arms.dense: written twice, first on line \d+; keep one"):
        load_experiment("compare.yaml")


def test_settings_of_an_arm(workplace):
    experiment = load_experiment("compare.yaml", ["lora.r=2"])
    settings = settings_of(experiment, "dense", 3)
    assert (settings.lora.r, settings.lrsa.top_k, settings.train.seed) == (2, 8, 3)
    assert settings.train.output_dir == "runs/compared/dense/seed-3" and not settings.eval.control
