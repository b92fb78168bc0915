"""One run by every launcher that people use: two processes, the same adapter."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_run import ENVIRONMENT, ROOT, SETTINGS, free_port, make_workplace
from tests.train.distributed.test_processes import FOUR_ROWS, STEPS, adapter, alone
from train.distributed import environment
from train.settings.errors import SettingsError
from train.settings.schema import TrainSettings

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
    "accelerate": [
        *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
    ],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_by(launcher, workplace):
    zero = "configs/deepspeed/zero2.json" if launcher == "deepspeed" else "null"
    program, *options = LAUNCHERS[launcher]
    command = [str(Path(sys.executable).with_name(program)), *options, str(free_port())]
    command += [str(ROOT / "launch/train.py"), "--config", "run.yaml", "--set", f"train.output_dir={launcher}", *STEPS]
    command += ["train.per_device_train_batch_size=2", f"train.deepspeed={zero}"]
    done = subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 processes = 4 rows per step" in done.stdout
    one = adapter(alone(workplace, f"{launcher}-alone", FOUR_ROWS))
    torch.testing.assert_close(adapter(workplace / launcher), one, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_what_accelerate_asks_for_and_the_settings_do_not_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SettingsError, match=f"accelerate launch was given --use_{name.lower()}"):
        environment.start(TrainSettings(**SETTINGS["train"]))


def test_image_installs_what_it_copies():
    """The Dockerfile cannot be built here without a daemon: what it names must be there, before it is used."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"^ARG EXTRAS=(.*)$", "\n".join(lines), re.M)[1].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    install = next(number for number, line in enumerate(lines) if line.startswith("RUN pip install"))
    assert {"pyproject.toml", "README.md", "lrsa"} <= {n for line in lines[:install] for n in line.split()[1:-1]}
