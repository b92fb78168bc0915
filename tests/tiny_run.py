"""A directory in which a run takes seconds: a random model, documents of many lengths, and run.yaml."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "model": {"name_or_path": "model"},
    "lrsa": {"sink_size": 4, "lag_size": 8, "top_k": 2},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "use_cpu": True,
    },
    "eval": {"keep_ratios": [0.5], "control": True, "enabled": False},
}


# For runs of which the beginning is looked at.
ONE_STEP = {name: SETTINGS[name] for name in ("model", "lrsa", "data")}
ONE_STEP |= {"train": {"output_dir": "run", "max_steps": 1, "use_cpu": True}, "eval": {"enabled": False}}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def make_workplace(directory: Path, tokenizer, settings: dict = SETTINGS) -> Path:
    """Fill `directory`; one epoch over its documents is four steps."""
    save_model(directory / "model", tokenizer, positions=128)
    rng = random.Random(0)
    documents = [" ".join(rng.choices(["river", "fox", "Anna", "3", "dog"], k=rng.randint(4, 24))) for _ in range(20)]
    rows = [json.dumps({"text": text}) + "\n" for text in documents]
    (directory / "text.jsonl").write_text("".join(rows[:16]))
    (directory / "held_out.jsonl").write_text("".join(rows[16:]))
    (directory / "run.yaml").write_text(json.dumps(settings))
    return directory


def save_model(directory: Path, tokenizer, positions: int) -> None:
    """A random Llama of two layers with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def run_here(workplace: Path, *overrides: str, config: str = "run.yaml", **options) -> int:
    """A run in this process; returns the exit status."""
    from launch.command_line import explain
    from train.run import run
    from train.settings.load import load_settings

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return explain(lambda: run(load_settings(config, list(overrides)), **options))


def launch(workplace: Path, *command: str) -> subprocess.CompletedProcess:
    """A command as a user would give it in `workplace`."""
    return subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


def launch_here(workplace: Path, script: str, *options: str) -> subprocess.CompletedProcess:
    """A script of this checkout with its options, in this process: to import the libraries takes longer than a run."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        patch.chdir(workplace)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [script, *options])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path[1:]])  # as `python script` has it
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess([script, *options], status, output.getvalue(), errors.getvalue())


def log_of(directory: Path) -> list[dict]:
    """The lines of a run's log that tell a loss."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def free_port() -> int:
    """A port that nothing listens on: tests, and other work on this machine, run side by side."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
