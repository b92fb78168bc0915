"""One run on one process and on several, by the real command line: DeepSpeed divides the work, the result stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import ROOT, make_workplace
from train.adapter import verify_adapter
from train.command_line import explain
from train.settings import load_settings

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
PORTS = iter(range(29700, 29800))
FOUR_ROWS = "train.per_device_train_batch_size=4"
STEPS = ["train.max_steps=4", "train.logging_steps=1", "train.save_strategy=no"]
STEPS += ["eval.control=false", "lora.lora_dropout=0"]
ZERO = "train.deepspeed=configs/deepspeed"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


def alone(workplace: Path, name: str, *overrides: str) -> Path:
    """A run in this process."""
    from train.pipeline import run

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        settings = load_settings("run.yaml", [f"train.output_dir={name}", *STEPS, *overrides])
        assert explain(lambda: run(settings)) == 0
    return workplace / name


def together(workplace: Path, processes: int, name: str, *overrides: str) -> tuple[Path, str]:
    """The same by the DeepSpeed launcher, and what it printed."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    if not deepspeed.is_file():
        pytest.skip("DeepSpeed is not installed")
    command = [str(deepspeed), "--num_gpus", str(processes), "--master_port", str(next(PORTS))]
    command += [str(ROOT / "launch" / "train.py"), "--config", "run.yaml"]
    command += ["--set", f"train.output_dir={name}", *STEPS, *overrides]
    done = subprocess.run(command, cwd=workplace, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return workplace / name, done.stdout


def logged(run: Path, name: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if "loss" in line], dtype=torch.float64)


def adapter(run: Path) -> torch.Tensor:
    tensors = load_file(run / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def results(run: Path) -> dict[str, torch.Tensor]:
    return {"loss": logged(run, "loss"), "grad_norm": logged(run, "grad_norm"), "adapter": adapter(run)}


@pytest.fixture(scope="module")
def truth(workplace) -> tuple[Path, dict[str, float]]:
    """The run on one process, and the error that fp32 makes: what the same run gives, its rows added up one by one."""
    run = alone(workplace, "one", FOUR_ROWS)
    assert (logged(run, "kept_fraction") < 0.95).all(), "too little is dropped to tell"
    split = alone(workplace, "split", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4")
    return run, errors(split, run)


def errors(run: Path, expected: Path) -> dict[str, float]:
    pairs = ((name, found, results(expected)[name]) for name, found in results(run).items())
    return {name: ((found - truth).abs().max() / truth.abs().max()).item() for name, found, truth in pairs}


def assert_same(run: Path, truth: tuple[Path, dict[str, float]]) -> None:
    """As far from the one process as fp32 is anyway, times four for more partial sums than the four of one row each."""
    expected, noise = truth
    assert verify_adapter(run) == verify_adapter(expected) > 0
    if "packed" not in run.name:  # a packed row is padded to a multiple of sp_size, and TRL counts that
        assert (logged(run, "num_tokens") == logged(expected, "num_tokens")).all()
    assert (logged(run, "kept_fraction") == logged(expected, "kept_fraction")).all()
    for name, error in errors(run, expected).items():
        assert error <= 4 * max(noise[name], torch.finfo(torch.float32).eps), f"{name}: {error} against {noise[name]}"


TWO_ROWS_OF_TWO = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
CASES = {
    "ZeRO-3": (2, [f"{ZERO}/zero3.json", "train.per_device_train_batch_size=2"]),
    "ZeRO-3, offload": (2, [f"{ZERO}/zero3_offload.json", "train.per_device_train_batch_size=2"]),
    "Ulysses": (
        2,
        [f"{ZERO}/zero2.json", "parallel.sp_size=2", "train.gradient_checkpointing=true", *TWO_ROWS_OF_TWO],
    ),
    "Ulysses over the KV heads' number, ZeRO-3": (4, [f"{ZERO}/zero3.json", "parallel.sp_size=4", *TWO_ROWS_OF_TWO]),
    "two groups of Ulysses": (4, [f"{ZERO}/zero2.json", "parallel.sp_size=2", "train.per_device_train_batch_size=2"]),
}
SLOW = ("ZeRO-3, offload", "Ulysses over the KV heads' number, ZeRO-3", "two groups of Ulysses")


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES])
def test_several_processes_end_as_one(workplace, truth, case):
    processes, overrides = CASES[case]
    run, output = together(workplace, processes, case.replace(" ", "-").replace("'", ""), *overrides)
    assert_same(run, truth)
    assert "= 4 rows per step" in output
    assert f"DeepSpeed ZeRO-{3 if 'zero3' in overrides[0] else 2}" in output
    assert ("sp_size" in output) == ("Ulysses" in case)


SHARED = [f"{ZERO}/zero2.json", "parallel.sp_size=2"]


@pytest.mark.slow
def test_packed_rows_are_shared(workplace, truth):
    packed = ["train.packing=true", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"]
    one = alone(workplace, "packed", *packed)
    run, _ = together(workplace, 2, "packed-shared", *packed, *SHARED, "eval.enabled=true")
    assert_same(run, (one, truth[1]))
    assert (run / "report.md").is_file(), "evaluation follows in the same process, on whole rows"


@pytest.mark.slow
def test_a_control_with_shared_rows_is_dense(workplace, truth):
    """Two trainings in one process; for the second, ALST must wrap another attention."""
    overrides = [FOUR_ROWS, "eval.control=true"]
    one = alone(workplace, "control-alone", *overrides)
    run, _ = together(workplace, 2, "control-shared", *overrides, *SHARED)
    for part in (".", "control"):
        assert_same(run / part, (one / part, truth[1]))
    assert not torch.equal(logged(run, "loss"), logged(run / "control", "loss"))


@pytest.mark.slow
def test_the_selection_is_taught_on_shared_rows(workplace, truth):
    overrides = [*TWO_ROWS_OF_TWO, "objective.selection=0.5", "objective.distillation=0.5"]
    one = alone(workplace, "taught", *overrides)
    run, _ = together(workplace, 2, "taught-shared", *overrides, *SHARED)
    assert_same(run, (one, truth[1]))
    assert (logged(run, "selection") > 0).all()
