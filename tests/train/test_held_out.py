"""The held-out loss while it trains, with the full and the trained cache: logged, tracked, drawn, and stopped by."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lrsa
from lrsa.evaluation.report.pictures import _losses
from tests.tiny_run import ENVIRONMENT, ROOT, make_workplace, run_here

SETTINGS = {
    "model": {"name_or_path": "model"},
    "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 1},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {
        "output_dir": "run", "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.05, "use_cpu": True,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2,
        "early_stopping_patience": 1, "lr_scheduler_type": "constant",
    },
    "eval": {"enabled": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    directory = make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)
    assert run_here(directory) == 0
    return directory


def held_out(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def test_both_losses_are_those_of_the_saved_adapter(workplace):
    best = min(held_out(workplace / "run"), key=lambda line: line["eval_loss"])
    model, tokenizer, _ = lrsa.load(workplace / "run")
    rows = [json.loads(line)["text"] for line in (workplace / "held_out.jsonl").read_text().splitlines()]
    ids = [tokenizer(f"<s>{text}</s>", return_tensors="pt")["input_ids"] for text in rows]
    config = model.get_base_model().config.lrsa
    assert max(row.shape[1] for row in ids) > config.dense_length
    for key, setting in (("eval_loss", config), ("eval_loss_full_cache", config.full())):
        lrsa.apply_lrsa(model, setting)
        with torch.no_grad():
            sums = [model(row, labels=row).loss * (row.shape[1] - 1) for row in ids]
        assert best[key] == pytest.approx((sum(sums) / sum(row.shape[1] - 1 for row in ids)).item(), rel=1e-4)
    assert all(line["eval_loss"] != line["eval_loss_full_cache"] for line in held_out(workplace / "run"))


def test_training_ends_when_the_compressed_loss_rises_and_keeps_the_best(workplace, capsys):
    run = workplace / "run"
    losses = {line["step"]: line["eval_loss"] for line in held_out(run)}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 1 < 8 and losses[max(losses)] > losses[best]
    kept = load_file(run / f"checkpoint-{best}" / "adapter_model.safetensors")
    found = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert run_here(workplace, resume=True) == 0
    assert "already holds a finished adapter" in capsys.readouterr().out
    assert max(line["step"] for line in held_out(run)) == best + 1


@pytest.mark.slow
def test_patience_is_resumed(workplace):
    """Of two evaluations without progress one came before the stop."""
    given = ["train.early_stopping_patience=2", "train.max_steps=20", "train.save_total_limit=null"]
    assert run_here(workplace, "train.output_dir=whole", *given) == 0
    steps = [line["step"] for line in held_out(workplace / "whole")]
    assert steps[-1] < 20
    (workplace / "whole").rename(workplace / "resumed")
    for path in (workplace / "resumed").glob("adapter*"):
        path.unlink()
    shutil.rmtree(workplace / "resumed" / f"checkpoint-{steps[-1]}")
    assert run_here(workplace, "train.output_dir=resumed", *given, resume=True) == 0
    assert [line["step"] for line in held_out(workplace / "resumed")] == steps


def test_both_curves_are_in_the_picture(workplace):
    found = _losses(workplace / "run" / "log.jsonl")
    assert len(found["eval_loss"]) == len(found["eval_loss_full_cache"]) == len(held_out(workplace / "run"))
    assert (workplace / "run" / "training_losses.png").stat().st_size > 0


def test_patience_needs_evaluations(workplace, capsys):
    assert run_here(workplace, "train.eval_strategy=no", "train.output_dir=refused") == 2
    assert "train.early_stopping_patience: needs train.eval_strategy: steps" in capsys.readouterr().err
    assert run_here(workplace, "data.eval_rows=0", "train.output_dir=refused") == 2
    assert "train.eval_strategy: needs rows that are held out: set data.eval_rows" in capsys.readouterr().err


NO_STOP = ["train.early_stopping_patience=null", "train.max_steps=2", "train.save_strategy=no"]


@pytest.mark.slow
def test_tensorboard_shows_both(workplace, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(workplace / "board"))
    assert run_here(workplace, "train.output_dir=tensorboard", "train.report_to=tensorboard", *NO_STOP) == 0
    [file] = (workplace / "board").rglob("events*")
    events = accumulator.EventAccumulator(str(file.parent))
    events.Reload()
    for tag, key in (("eval/loss", "eval_loss"), ("eval/loss_full_cache", "eval_loss_full_cache")):
        values = [event.value for event in events.Scalars(tag)]
        assert values == pytest.approx([line[key] for line in held_out(workplace / "tensorboard")], rel=1e-6)


@pytest.mark.slow
def test_wandb_keeps_both_offline(workplace, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(workplace))
    assert run_here(workplace, "train.output_dir=wandb-run", "train.report_to=wandb", *NO_STOP) == 0
    import wandb

    wandb.finish()
    [file] = workplace.glob("wandb/offline-run-*/*.wandb")
    assert b"eval/loss" in file.read_bytes() and b"eval/loss_full_cache" in file.read_bytes()


@pytest.mark.slow
def test_trackio_keeps_both_offline(workplace):
    pytest.importorskip("trackio")
    given = ["train.output_dir=trackio-run", "train.report_to=trackio", *NO_STOP]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", "run.yaml", "--set", *given]
    environment = ENVIRONMENT | {"TRACKIO_DIR": str(workplace / "trackio")}
    subprocess.run(command, cwd=workplace, env=environment, check=True, capture_output=True)
    [file] = (workplace / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        rows = str([row for name in tables for row in database.execute(f"select * from {name}")])
    assert "eval/loss" in rows and "eval/loss_full_cache" in rows
