"""Faults of long runs, injected into real runs of a tiny model: what is continued ends as if nothing had happened."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import tiny_run
from tests.tiny_run import make_workplace
from tests.train.resume.launched import assert_same, lines, start, step_of, wait_until
from train.resume.checkpoints import checkpoints, damage
from train.resume.time_limit import TimeLimit
from train.run import run
from train.settings.errors import SettingsError
from train.settings.load import load_settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer)


@pytest.fixture(scope="module")
def undisturbed(workplace) -> Path:
    """A run from the beginning to the end. Checkpoints and lines of the log come at different steps, dropout draws
    random numbers, and the last step is in the middle of the third epoch."""
    assert run_here(workplace, "undisturbed") == 0
    return workplace / "undisturbed"


def run_here(workplace: Path, name: str, *overrides: str, **options) -> int:
    """A run in this process; returns the exit status."""
    torch.set_num_threads(1)
    return tiny_run.run_here(workplace, f"train.output_dir={name}", *overrides, **options)


def test_killed_while_a_checkpoint_is_written(workplace, undisturbed, capsys):
    killed = workplace / "killed"
    process = start(workplace, "killed", "one process", "--resume")
    half = killed / "checkpoint-4"
    assert wait_until(half.is_dir, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert damage(half).startswith("no complete.json") and step_of(killed) == 2
    assert run_here(workplace, "killed", resume=True) == 0
    assert "Skipping incomplete checkpoint killed/checkpoint-4: no complete.json" in capsys.readouterr().out
    assert_same(killed, undisturbed)


def test_sigterm_ends_a_run_with_a_checkpoint(workplace, undisturbed, capsys):
    stopped = workplace / "stopped"

    def terminate() -> None:
        wait_until((stopped / "checkpoint-2").is_dir)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat themselves

    thread = threading.Thread(target=terminate)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert run_here(workplace, "stopped") == 75
    thread.join()
    step = step_of(stopped)
    assert 2 <= step < 10 and signal.getsignal(signal.SIGTERM) == before
    message = capsys.readouterr().err
    assert (
        f"Stopped by SIGTERM after step {step} of 10. The same command with --resume continues from stopped/check"
        in message
    )
    assert run_here(workplace, "stopped", "train.resume_from_checkpoint=auto") == 0
    assert_same(stopped, undisturbed)


def test_a_finished_adapter_is_not_trained_again(workplace, undisturbed, capsys):
    """Killed in the control's first steps, then between training and evaluation."""
    again = workplace / "again"
    shutil.copytree(undisturbed, again)
    shutil.rmtree(again / "control")
    before = (again / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_here(workplace, "again", "eval.enabled=true", resume=True) == 0
    assert (again / "report.md").is_file() and "again already holds a finished adapter" in capsys.readouterr().out
    assert (again / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert_same(again, undisturbed)
    (again / "report.md").unlink()
    assert run_here(workplace, "again", "eval.enabled=true", resume=True) == 0
    assert (again / "report.md").is_file() and "training the" not in capsys.readouterr().out
    assert_same(again, undisturbed)


def test_killed_after_the_last_checkpoint(workplace, undisturbed):
    """No further step is taken, only the adapter is saved; a finished one goes on when more steps are asked for."""
    last = workplace / "last"
    shutil.copytree(undisturbed, last)
    for directory in (last, last / "control"):
        (directory / "trainer_state.json").unlink()
        (directory / "adapter_model.safetensors").write_bytes(b"cut")
    assert run_here(workplace, "last", resume=True) == 0
    assert_same(last, undisturbed)
    assert run_here(workplace, "last", "train.max_steps=12", "eval.control=false", resume=True) == 0
    assert [line["step"] for line in lines(last)] == [3, 6, 9, 12]


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", "complete.json"])
def test_a_checkpoint_cut_short(workplace, undisturbed, file, capsys):
    name = f"cut-{file}"
    shutil.copytree(undisturbed, workplace / name)
    for directory in (workplace / name, workplace / name / "control"):
        (directory / "trainer_state.json").unlink()
        cut = directory / "checkpoint-10" / file
        os.truncate(cut, cut.stat().st_size // 2)
    assert run_here(workplace, name, resume=True) == 0
    assert f"Skipping incomplete checkpoint {name}/checkpoint-10: " in capsys.readouterr().out
    assert_same(workplace / name, undisturbed)


def test_a_full_disk(workplace, undisturbed, capsys):
    """No file may grow beyond the adapter's size: the optimizer's, twice as large, breaks off."""
    full, limits = workplace / "full", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        wait_until((full / "checkpoint-2" / "complete.json").is_file)
        resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, limits[1]))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        assert run_here(workplace, "full") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    thread.join()
    good, message = step_of(full), capsys.readouterr().err
    assert f"full/checkpoint-{good + 2} could not be written after step {good + 2}: " in message
    assert f"The same command with --resume continues from full/checkpoint-{good}" in message
    assert checkpoints(full)[-1].name == f"checkpoint-{good}", "the half of a checkpoint was taken away"
    assert run_here(workplace, "full", resume=True) == 0
    assert_same(full, undisturbed)


@pytest.mark.parametrize(
    ("rate", "message"),
    [("1e20", "The loss of step 3 is not finite"), ("3e39", "The weights after step 2 are not finite")],
)
def test_a_loss_that_is_not_finite(workplace, rate, message, capsys):
    """The first step of the warmup has a learning rate of 0; what comes after it diverges."""
    directory = workplace / f"diverged-{rate}"
    settings = [f"train.learning_rate={rate}", "train.warmup_steps=4", "train.save_steps=1"]
    assert run_here(workplace, directory.name, *settings) == 1
    told, good = capsys.readouterr().err, step_of(directory)
    assert message in told and f"continues from {directory.name}/checkpoint-{good}" in told
    assert good == (2 if rate == "1e20" else 1) and checkpoints(directory)[-1].name == f"checkpoint-{good}"
    assert not (directory / "adapter_model.safetensors").exists()
    assert run_here(workplace, directory.name, "train.learning_rate=1e-3", resume=True) == 2
    assert "train.learning_rate: was" in capsys.readouterr().err


def test_a_number_of_minutes(workplace, monkeypatch, capsys):
    """Eight steps of an eighth of a minute, whose learning rate falls by the time; a resumed run counts on."""
    limit = ["train.max_minutes=1", "train.max_steps=40", "train.logging_steps=1", "eval.control=false"]
    limit += ["train.save_steps=3"]
    monkeypatch.setattr(TimeLimit, "now", lambda limit: limit.spent + 0.125)
    assert run_here(workplace, "minutes", *limit) == 0
    assert "train.max_minutes used up after step 8" in capsys.readouterr().out
    whole = workplace / "minutes"
    assert checkpoints(whole)[-1].name == "checkpoint-8", "the last step is saved, to go on from"
    rates = {line["step"]: line["learning_rate"] for line in lines(whole)}
    shares = [1, 0.975, *(1 - 0.125 * steps for steps in range(1, 7))]  # the second step has one of 40 steps behind it
    assert rates == pytest.approx({step + 1: 0.01 * share for step, share in enumerate(shares)})
    assert run_here(workplace, "minutes", *limit, "eval.control=true", resume=True) == 0
    assert "already holds a finished adapter" in capsys.readouterr().out
    assert len(lines(whole / "control")) == 8, "the control takes as many steps"
    (whole / "adapter_model.safetensors").unlink()
    shutil.rmtree(checkpoints(whole)[-1])
    assert run_here(workplace, "minutes", *limit, resume=True) == 0
    assert {line["step"]: line["learning_rate"] for line in lines(whole)} == pytest.approx(rates)
    capsys.readouterr()
    assert run_here(workplace, "minutes", *limit, "train.max_minutes=1.25", resume=True) == 0
    assert "train.max_minutes used up after step 10" in capsys.readouterr().out, "more minutes are used"
    assert run_here(workplace, "minutes", *limit, "objective.schedule=shrink") == 2
    assert "shrink divides the steps" in capsys.readouterr().err


def test_a_corrupt_row_is_named(workplace, capsys):
    rows = (workplace / "text.jsonl").read_text().splitlines()
    (workplace / "corrupt.jsonl").write_text("\n".join([*rows[:6], rows[6][:9], *rows[7:]]))
    assert run_here(workplace, "corrupt", "data.path=corrupt.jsonl") == 2
    assert "corrupt.jsonl:7: not valid JSON" in capsys.readouterr().err
    assert not (workplace / "corrupt").exists()


def test_two_runs_in_one_directory(workplace, capsys):
    (workplace / "busy").mkdir()
    with FileLock(workplace / "busy" / ".lock"):
        assert run_here(workplace, "busy") == 2
    assert "another run uses busy" in capsys.readouterr().err


def test_a_refused_run_leaves_its_directory_to_the_next_one(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    refused = []
    for _ in range(2):
        settings = load_settings("run.yaml", ["train.output_dir=refused", "lora.target_modules=[nothing]"])
        with pytest.raises(SettingsError, match=r"lora\.target_modules") as error:
            run(settings, overwrite=True)
        refused.append(error)  # its frames are still alive, as they are in a notebook


def test_other_processes_cannot_continue(workplace, undisturbed, capsys):
    shutil.copytree(undisturbed, workplace / "other")
    (workplace / "other" / "trainer_state.json").unlink()
    whole = workplace / "other" / "checkpoint-10" / "complete.json"
    whole.write_text(whole.read_text().replace('"processes": 1', '"processes": 2'))
    assert run_here(workplace, "other", resume=True) == 2
    assert "was written by 2 processes without DeepSpeed, this run has 1 process without" in capsys.readouterr().err
