"""The real command line on a tiny random model and local text: what a run leaves behind, and that it may be split."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrsa import LRSAConfig
from lrsa.attention import api
from tests.tiny_run import ROOT, free_port, launch, launch_here, log_of, make_workplace, run_here
from train.settings.load import load_settings
from train.trainer import kept_tokens

LRSA = {"sink_size": 4, "lag_size": 8, "top_k": 2, "skip_layers": [0]}
SETTINGS = {
    "model": {"name_or_path": "model"},
    "lrsa": LRSA,
    "lora": {"r": 4},
    "objective": {"cross_entropy": 1.0, "distillation": 0.5, "selection": 0.5, "keep_ratios": [0.25]},
    "data": {"kind": "text", "path": "text.jsonl", "eval_path": "held_out.jsonl", "context_length": 96},
    "train": {
        "output_dir": "runs/first",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    },
    "eval": {"keep_ratios": [0.5], "control": True},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, byte_tokenizer) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), byte_tokenizer, SETTINGS)


@pytest.fixture(scope="module")
def finished(workplace) -> tuple[Path, str]:
    """The directory and the output of one whole run, control and evaluation included, as plain `python`."""
    done = launch(workplace, sys.executable, str(ROOT / "launch" / "train.py"), "--config", "run.yaml")
    assert done.returncode == 0, done.stderr
    return workplace / "runs" / "first", done.stdout


def test_a_run_leaves_everything_behind(finished):
    directory, _ = finished
    for name in ["adapter_model.safetensors", "adapter_config.json", "lrsa_config.json", "config.yaml", "log.jsonl"]:
        assert (directory / name).stat().st_size > 0, name
    for name in ["data_report.json", "data_report.md", "results.json", "report.md", "score_vs_keep_ratio.png"]:
        assert (directory / name).stat().st_size > 0, name
    assert "dense-LoRA" in (directory / "README.md").read_text(), "the card shows what was measured"
    assert (directory / "control" / "adapter_model.safetensors").is_file()
    assert not (directory / "control" / "lrsa_config.json").exists(), "the control is dense"


def test_the_adapter_is_trained_and_knows_its_compression(finished):
    directory, _ = finished
    ours, control = (load_file(path / "adapter_model.safetensors") for path in (directory, directory / "control"))
    up = [name for name in ours if "lora_B" in name]
    assert up and all(ours[name].any() for name in up)
    assert any(not torch.equal(ours[name], control[name]) for name in up), "the control was trained under LRSA too"
    assert LRSAConfig.from_pretrained(directory) == LRSAConfig(**LRSA)
    assert LRSAConfig.from_pretrained(directory / "checkpoint-2") == LRSAConfig(**LRSA), "every save holds it"


def test_the_stored_settings_say_everything(finished, monkeypatch):
    directory, _ = finished
    stored = load_settings(str(directory / "config.yaml"))
    assert stored.model.dtype == "float32" and stored.train.bf16 is False and stored.train.use_cpu
    assert stored.lrsa == LRSAConfig(**LRSA)


def test_the_banner_says_what_is_trained(finished):
    _, output = finished
    assert "sink 4, lag 8, top_k 2 (keep ratio 0.25), layers 0 dense" in output
    assert "4 per device x 1 accumulated x 1 process = 4 rows per step" in output
    assert "16 rows, " in output and "long enough to be compressed" in output
    assert "dense causal" in output, "the control has its own banner"
    assert "implementation: native (compiled for this CPU)" in " ".join(output.replace("│", " ").split())


def test_the_implementation_that_is_set_computes_the_attention(workplace, finished, monkeypatch, capsys):
    calls = dict.fromkeys(api.IMPLEMENTATIONS, 0)

    def counted(name, attend, *args, **kwargs):
        calls[name] += 1
        return attend(*args, **kwargs)

    counting = {name: partial(counted, name, attend) for name, attend in api.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", counting)
    overrides = ["model.attention=reference", "train.output_dir=runs/reference", "eval.enabled=false"]
    assert run_here(workplace, *overrides, "eval.control=false") == 0
    assert calls["reference"] > 0 and sum(calls.values()) == calls["reference"]
    assert "implementation: reference (a dense mask)" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    losses = [[line["loss"] for line in log_of(path)] for path in (finished[0], workplace / "runs" / "reference")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_logged_kept_fraction_is_that_of_the_rows_lengths(finished, byte_tokenizer):
    directory, _ = finished
    log = log_of(directory)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    totals = [0, *(line["num_tokens"] for line in log)]
    seen = [now - before for before, now in pairwise(totals)]
    texts = [json.loads(line)["text"] for line in (directory.parents[1] / "text.jsonl").read_text().splitlines()]
    lengths = [len(row) for row in byte_tokenizer(texts)["input_ids"]]
    extra = (sum(seen) - sum(lengths)) / len(lengths)
    assert extra in (0, 1, 2), "one epoch reads every token once, and those that begin and end a document"
    kept = kept_tokens([length + int(extra) for length in lengths], LRSAConfig(**LRSA), [None, None])
    logged = sum(line["kept_fraction"] * tokens for line, tokens in zip(log, seen, strict=True))
    assert logged == pytest.approx(kept, abs=1e-4 * sum(seen)) and kept < 0.9 * sum(seen)
    assert all(line["kept_fraction"] == 1 for line in log_of(directory / "control"))


def test_kept_tokens_of_rows_and_layers():
    config = LRSAConfig(sink_size=4, lag_size=8, top_k=2)
    assert kept_tokens([19, 21, 36], config, [None, None]) == 19 + (21 - 6) + (36 - 3 * 6)
    half = config.replace(skip_layers=(1, 7))
    assert kept_tokens([36], half, [None, None]) == (36 + 18) / 2
    assert kept_tokens([36, 8], config, [None, 12]) == (18 + 8 + 12 + 8) / 2
    assert kept_tokens([36], None, [None, 12]) == 36


def test_two_processes_and_accumulation_under_deepspeed_equal_one(workplace, finished):
    """Two processes x 1 row x 2 accumulated steps are the 4 rows of a step of the plain run."""
    overrides = ["train.output_dir=runs/two", "train.deepspeed=configs/deepspeed/zero2.json"]
    overrides += ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"]
    overrides += ["eval.enabled=false", "eval.control=false"]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    script = str(ROOT / "launch" / "train.py")
    done = launch(
        workplace,
        str(deepspeed),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        script,
        "--config",
        "run.yaml",
        "--set",
        *overrides,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 per device x 2 accumulated x 2 processes = 4 rows per step" in done.stdout
    assert "DeepSpeed ZeRO-2" in done.stdout
    one, two = log_of(finished[0]), log_of(workplace / "runs" / "two")
    for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4, "kept_fraction": 0, "num_tokens": 0}.items():
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=tolerance), name
    adapters = [load_file(path / "adapter_model.safetensors") for path in (finished[0], workplace / "runs" / "two")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_second_run_is_refused_and_a_stopped_one_is_resumed(workplace, finished, capsys):
    stopped = workplace / "runs" / "stopped"
    shutil.copytree(finished[0], stopped)
    assert run_here(workplace, "train.output_dir=runs/stopped") == 2
    message = capsys.readouterr().err
    assert "runs/stopped already holds a run (adapter_model.safetensors): continue its last checkpoint with" in message
    (stopped / "adapter_model.safetensors").unlink()
    shutil.rmtree(stopped / "checkpoint-4")
    options = ["train.output_dir=runs/stopped", "eval.enabled=false", "eval.control=false"]
    assert run_here(workplace, *options, "lrsa.top_k=3", "objective.keep_ratios=[0.375]", resume=True) == 2
    assert "lrsa.top_k: was 2 when this run began, is 3" in capsys.readouterr().err
    assert run_here(workplace, *options, resume=True) == 0
    whole, resumed = log_of(finished[0]), log_of(stopped)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert resumed[:2] == whole[:2] and resumed[2:] != whole[2:], "the first two steps were not taken again"
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_overwrite_starts_again_and_leaves_other_files_alone(workplace, finished):
    again = workplace / "runs" / "again"
    shutil.copytree(finished[0], again)
    (again / "notes.txt").write_text("mine")
    options = ["train.output_dir=runs/again", "eval.enabled=false", "eval.control=false", "train.packing=true"]
    assert run_here(workplace, *options, overwrite=True) == 0
    assert (again / "notes.txt").read_text() == "mine"
    assert not (again / "results.json").exists() and not (again / "control").exists()
    assert "This adapter was not evaluated" in (again / "README.md").read_text()
    assert all(0.25 < line["kept_fraction"] < 1 for line in log_of(again))


def test_rows_of_a_step_cannot_change_on_the_way(workplace, finished, capsys):
    changed = ["train.per_device_train_batch_size=2"]
    assert run_here(workplace, *changed, resume=True) == 2
    message = "Per-process batch size changed from 4 to 2 rows per step"
    assert f"train.per_device_train_batch_size: {message}" in capsys.readouterr().err
    assert (
        run_here(workplace, *changed, "train.gradient_accumulation_steps=2", "train.warmup_steps=1", resume=True) == 2
    )
    message = capsys.readouterr().err
    assert "train.warmup_steps: was 0 when this run began, is 1" in message and "batch size" not in message


def test_a_moved_project_is_resumed(workplace, finished, tmp_path, capsys):
    shutil.copytree(workplace, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-4"))
    run = tmp_path / "moved" / "runs" / "first"
    (run / "adapter_model.safetensors").unlink()
    assert f"path: {workplace}" not in (run / "config.yaml").read_text(), "local paths are relative to the file"
    assert run_here(tmp_path / "moved", "eval.enabled=false", "eval.control=false", resume=True) == 0
    assert [line["loss"] for line in log_of(run)] == pytest.approx([line["loss"] for line in log_of(finished[0])])
    stored = (run / "config.yaml").read_text()
    options = ["eval.enabled=false", "eval.control=false"]
    for setting, place in (("data.path", "text.jsonl"), ("model.name_or_path", "model")):
        name = setting.partition(".")[2]
        assert f"{name}: ../../{place}" in stored
        (run / "config.yaml").write_text(stored.replace(f"{name}: ../../{place}", f"{name}: /gone/away"))
        assert run_here(tmp_path / "moved", *options, resume=True) == 2
        assert "is accepted in its new one when the command line names it" in capsys.readouterr().err
        assert run_here(tmp_path / "moved", *options, f"{setting}={place}", resume=True) == 0
        assert f"{name}: ../../{place}" in (run / "config.yaml").read_text()
    shutil.copytree(workplace / "model", tmp_path / "moved" / "another")
    assert run_here(tmp_path / "moved", *options, "model.name_or_path=another", resume=True) == 2
    assert "model.name_or_path: was" in capsys.readouterr().err, "the first model is still there"


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_no_run_are_not_written_over(workplace, tmp_path, overwrite, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert run_here(workplace, f"train.output_dir={tmp_path}", overwrite=overwrite) == 2
    assert "holds README.md but no config.yaml, so it is not the directory of a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_what_was_measured_goes_when_training_goes_on(workplace, finished, capsys):
    longer = workplace / "runs" / "longer"
    shutil.copytree(finished[0], longer)
    (longer / "evaluation" / "another source").mkdir(parents=True)
    assert run_here(workplace, "train.output_dir=runs/longer", "eval.enabled=false", resume=True) == 0
    assert (longer / "results.json").exists(), "nothing was trained"
    options = ["train.output_dir=runs/longer", "train.max_steps=6", "eval.enabled=false", "eval.control=false"]
    assert run_here(workplace, *options, resume=True) == 0
    assert "train.max_steps was 4, is 6: from here on the learning rate is" in capsys.readouterr().out
    left = [name for name in ("results.json", "report.md", "evaluation") if (longer / name).exists()]
    assert left == [] and "This adapter was not evaluated" in (longer / "README.md").read_text()


def test_a_finished_run_is_evaluated_again(workplace, finished):
    before = (finished[0] / "results.json").read_bytes()
    out = workplace / "again"
    options = ["--run", str(finished[0]), "--keep-ratios", "1/2,1/8", "--rows", "3", "--out", str(out)]
    done = launch_here(workplace, "launch/evaluate.py", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["rows"]["n"] == 3 and "dense-LoRA" in done.stdout and "keep 1/8" in done.stdout
    assert (finished[0] / "results.json").read_bytes() == before, "--out leaves the run's own report alone"


def test_mistakes_of_the_command_line_end_with_one_message(workplace):
    options = ["--config", "run.yaml", "--set", "lrsa.top_k=9", "lora.rr=1"]
    done = launch_here(workplace, "launch/train.py", *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines() == [
        "--set lrsa.top_k must be between 1 and lag_size (8), got 9: lower top_k or raise lag_size.",
        "--set lora.rr: unknown setting; did you mean r?",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=missing.jsonl"], "data.path missing.jsonl: no such file"),
        (["data.path=empty.jsonl"], "there is no record in it"),
        (["data.columns.text=body"], "there is no column 'body'; the columns are text."),
        (["lora.target_modules=[no_proj]"], "no module of the model is called no_proj; did you mean o_proj?"),
        (["lrsa.skip_layers=[5]"], "lrsa: skip_layers must name layers from 0 to 1, got [5]"),
        (["train.lr_scheduler_type=reduce_lr_on_plateau"], "refused by TRL's SFTConfig: lr_scheduler_type"),
        (["train.max_steps=1", "train.warmup_steps=5"], "is untrained: every lora_B is zero"),
    ],
)
def test_mistakes_that_only_a_run_can_find(workplace, capsys, overrides, message):
    (workplace / "empty.jsonl").write_text("")
    name = "-".join(message.split()[:3]).replace("/", "-")
    assert run_here(workplace, *overrides, f"train.output_dir=runs/{name}", "eval.control=false") == 2
    assert message in capsys.readouterr().err


def test_a_model_directory_that_cannot_be_loaded(workplace, capsys):
    (workplace / "broken").mkdir(exist_ok=True)
    (workplace / "broken" / "config.json").write_text('{"model_type": "no-such-type"}')
    assert run_here(workplace, "model.name_or_path=broken", "train.output_dir=runs/broken") == 2
    assert "cannot be loaded as a causal language model with its tokenizer: " in capsys.readouterr().err
