"""One run on one process and on several, by the real command line: DeepSpeed divides the work, the result stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.command_line import explain
from tests.tiny_run import ROOT, free_port, make_workplace
from train.adapter import verify_adapter
from train.settings.load import load_settings

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SCRIPT = ROOT / "launch" / "train.py"
FOUR_ROWS = "train.per_device_train_batch_size=4"
STEPS = ["train.max_steps=4", "train.logging_steps=1", "train.save_strategy=no"]
STEPS += ["objective.keep_ratios=[0.25]", "eval.control=false", "lora.lora_dropout=0"]
ZERO = "train.deepspeed=configs/deepspeed"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


def alone(workplace: Path, name: str, *overrides: str, exact: bool = False) -> Path:
    """A run in this process, if `exact` in fp64."""
    from train import run as pipeline
    from train.run import load_model, run

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        if exact:
            patch.setattr(pipeline, "load_model", lambda settings: load_model(settings).double())
        settings = load_settings("run.yaml", [f"train.output_dir={name}", *STEPS, *overrides])
        assert explain(lambda: run(settings)) == 0
    return workplace / name


def together(workplace: Path, processes: int, name: str, *overrides: str, script=SCRIPT) -> tuple[Path, str]:
    """The same by the DeepSpeed launcher, and what it printed."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_gpus", str(processes), "--master_port", str(free_port())]
    command += [str(script), "--config", "run.yaml"]
    command += ["--set", f"train.output_dir={name}", *STEPS, *overrides]
    started = subprocess.Popen(
        command, cwd=workplace, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = started.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, output
    return workplace / name, output


def logged(run: Path, name: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if "loss" in line], dtype=torch.float64)


def adapter(run: Path) -> torch.Tensor:
    tensors = load_file(run / "adapter_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def results(run: Path) -> dict[str, torch.Tensor]:
    return {"loss": logged(run, "loss"), "grad_norm": logged(run, "grad_norm"), "adapter": adapter(run)}


def errors(run: Path, exact: Path) -> dict[str, float]:
    pairs = ((name, found, results(exact)[name]) for name, found in results(run).items())
    return {name: ((found - truth).abs().max() / truth.abs().max()).item() for name, found, truth in pairs}


class Expected:
    """A run on one process, in fp64, and what fp32 makes of it there."""

    def __init__(self, workplace: Path, name: str, *overrides: str):
        self.exact = alone(workplace, f"{name}-exact", *overrides, exact=True)
        self.one = alone(workplace, name, *overrides)
        assert (logged(self.one, "kept_fraction") < 0.95).all(), "too little is dropped to tell"

    def assert_same(self, run: Path, part: str = ".") -> None:
        """As far from the fp64 run as one process in fp32, times four: the sums are made of other parts."""
        run, one, exact = (path / part for path in (run, self.one, self.exact))
        assert verify_adapter(run) == verify_adapter(one) > 0
        assert (logged(run, "kept_fraction") == logged(one, "kept_fraction")).all()
        budget = errors(one, exact)
        for name, error in errors(run, exact).items():
            limit = 4 * max(budget[name], torch.finfo(torch.float32).eps)
            assert error <= limit < 1e-3, f"{name}: {error} against {budget[name]} of one process"


@pytest.fixture(scope="module")
def expected(workplace) -> Expected:
    return Expected(workplace, "one", FOUR_ROWS)


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
def test_several_processes_end_as_one(workplace, expected, case):
    processes, overrides = CASES[case]
    run, output = together(workplace, processes, case.replace(" ", "-").replace("'", ""), *overrides)
    expected.assert_same(run)
    assert (logged(run, "num_tokens") == logged(expected.one, "num_tokens")).all()
    assert "= 4 rows per step" in output
    assert f"DeepSpeed ZeRO-{3 if 'zero3' in overrides[0] else 2}" in output
    assert ("sp_size" in output) == ("Ulysses" in case)


SHARED = [f"{ZERO}/zero2.json", "parallel.sp_size=2"]


@pytest.mark.slow
def test_packed_rows_are_shared(workplace):
    packed = ["train.packing=true", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"]
    run, _ = together(workplace, 2, "packed-shared", *packed, *SHARED, "eval.enabled=true")
    Expected(workplace, "packed", *packed).assert_same(run)
    assert (run / "report.md").is_file(), "evaluation follows in the same process, on whole rows"


@pytest.mark.slow
def test_a_control_with_shared_rows_is_dense(workplace):
    """Two trainings in one process; for the second, ALST must wrap another attention."""
    overrides = [FOUR_ROWS, "eval.control=true"]
    run, _ = together(workplace, 2, "control-shared", *overrides, *SHARED)
    expected = Expected(workplace, "control-alone", *overrides)
    for part in (".", "control"):
        expected.assert_same(run, part)
    assert not torch.equal(logged(run, "loss"), logged(run / "control", "loss"))


@pytest.mark.slow
def test_the_selection_is_taught_on_shared_rows(workplace):
    overrides = [*TWO_ROWS_OF_TWO, "objective.selection=0.5", "objective.distillation=0.5"]
    run, _ = together(workplace, 2, "taught-shared", *overrides, *SHARED)
    Expected(workplace, "taught", *overrides).assert_same(run)
    assert (logged(run, "selection") > 0).all()


@pytest.mark.slow
def test_a_teacher_under_zero_3(workplace):
    """Processes with different numbers of trained tokens must gather the head equally often, or wait for ever."""
    script = workplace / "few_logits.py"
    script.write_text(
        f"import runpy, sys\nsys.path[0] = {str(ROOT)!r}\n"
        "from train.distributed import environment\nenvironment.prepare()\n"
        "import train.objective\ntrain.objective.LOGITS = 4000\n"
        f"sys.exit(runpy.run_path({str(SCRIPT)!r})['main']())\n"
    )
    overrides = ["objective.distillation=0.5", f"{ZERO}/zero3.json", "train.per_device_train_batch_size=2"]
    run, _ = together(workplace, 2, "distilled-3", *overrides, script=script)
    Expected(workplace, "distilled", overrides[0], FOUR_ROWS).assert_same(run)
