"""Predicted memory against what the allocator reports of real training steps, and the command line around it."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config
from trl import SFTConfig

from launch.command_line import explain
from lrsa import LRSAConfig, apply_lrsa
from lrsa.base_loading import BaseLoading
from tests.lrsa.models.build import build
from tests.tiny_run import ROOT, launch_here
from train.estimate import memory as memory_module
from train.estimate.advice import helpful_changes
from train.estimate.devices import DEVICES, this_device
from train.estimate.memory import predict_memory
from train.estimate.plan import Plan, plan_run, shape_from_config, shape_of
from train.settings.load import load_settings
from train.settings.schema import ObjectiveSettings
from train.trainer import LRSATrainer

LRSA = LRSAConfig(sink_size=16, lag_size=128, top_k=32)
TOKENS, VOCABULARY = 2048, 1000
QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip


def trainer_of(directory, lrsa, checkpointing: bool, bf16: bool, **objective) -> LRSATrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=TOKENS, torch_dtype=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32)
    rows = torch.randint(0, VOCABULARY, (2, TOKENS)).tolist()
    args = SFTConfig(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        use_cpu=True, bf16=bf16, activation_checkpointing=checkpointing, max_length=TOKENS, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return LRSATrainer(
        model=model if lrsa is None else apply_lrsa(model, lrsa),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * TOKENS] * 2}),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "data/tiny_base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        lrsa=lrsa,
        objective=ObjectiveSettings(**({"cross_entropy": 1.0} | objective)),
        base=BaseLoading(),
    )


def measured_bytes(trainer: LRSATrainer) -> int:
    """Weights, and the largest sum of live allocations in two steps; the second one has AdamW's state."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    gc.collect()  # what an earlier test left would be freed, and counted, during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        trainer.train()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return weights + peak


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("lrsa", [pytest.param(None, marks=pytest.mark.slow), LRSA], ids=["dense", "lrsa"])
def test_memory_of_a_real_step_is_predicted_within_20_percent(lrsa, checkpointing, bf16, tmp_path, monkeypatch):
    # TRL's tile of logits is as large as a small model's activations; a narrow one lets these decide.
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(memory_module, "LOGITS_TILE", (4096, 256))
    trainer = trainer_of(tmp_path, lrsa, checkpointing, bf16)
    plan = Plan(
        shape_of(trainer.model, 16), this_device(use_cpu=True), lrsa, TOKENS, bytes=2 if bf16 else 4, autocast=bf16,
        checkpointing=checkpointing,
    )  # fmt: skip
    measured, predicted = measured_bytes(trainer), predict_memory(plan).allocated
    assert predicted == pytest.approx(measured, rel=0.2), (
        f"{predicted / 2**20:.1f} MiB, measured {measured / 2**20:.1f}"
    )
    other = predict_memory(dataclasses.replace(plan, checkpointing=not checkpointing)).allocated
    assert other != pytest.approx(measured, rel=0.5), "checkpointing made no difference"


def test_the_tile_of_logits_is_part_of_the_prediction(tmp_path):
    trainer = trainer_of(tmp_path, LRSA, True, False)
    plan = Plan(shape_of(trainer.model, 16), this_device(use_cpu=True), LRSA, TOKENS, bytes=4)
    memory = predict_memory(plan)
    assert memory.loss > 3 * memory.mlp
    assert memory.allocated == pytest.approx(measured_bytes(trainer), rel=0.2)


@pytest.mark.parametrize("name", ["selection", "distillation"])
def test_what_a_teacher_adds_is_predicted(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 256)
    monkeypatch.setattr(memory_module, "LOGITS_TILE", (4096, 256))
    trainer = trainer_of(tmp_path, LRSA, False, False, **{name: 1.0})
    plan = Plan(
        shape_of(trainer.model, 16), this_device(use_cpu=True), LRSA, TOKENS, bytes=4, checkpointing=False,
        selection=name == "selection", distillation=name == "distillation",
    )  # fmt: skip
    predicted, alone = (predict_memory(p).allocated for p in (plan, dataclasses.replace(plan, **{name: False})))
    assert predicted == pytest.approx(measured_bytes(trainer), rel=0.2) and predicted > alone


def quickstart(*overrides: str):
    return load_settings("quickstart.yaml", ["train.per_device_train_batch_size=2", *overrides])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen3_5_text", "has recurrent layers"), ("youtu", r"has latent attention \(MLA\) and no q")],
)
def test_models_whose_memory_is_not_known(family, reason):
    with pytest.raises(ValueError, match=rf"{reason}.*train\.max_steps=2"):
        shape_of(build(family), 4)


def test_the_shape_of_a_published_model_from_its_configuration():
    shape = shape_from_config(QWEN_7B, quickstart())
    assert shape.parameters == 7_615_616_512 and shape.lora_parameters == 40_370_176, "Qwen2.5-7B, r 16"


@pytest.fixture(scope="module")
def large() -> Plan:
    """Too much for one GPU: 7B on 512k tokens."""
    return Plan(shape_from_config(QWEN_7B, quickstart()), DEVICES["h100"], LRSA, 2**19, gpus=8, batch=2)


def test_changes_lower_the_memory_and_those_that_fit_come_first(large):
    changes = helpful_changes(large)
    totals = [change.total for change in changes]
    assert len(changes) == 3 and max(totals) < predict_memory(large).total
    kept = dataclasses.replace(large, checkpointing=False)
    assert "train.activation_checkpointing=true" in [change.text for change in helpful_changes(kept, 9)]
    # Offloading is not enough here, another GPU or half the length is.
    near = dataclasses.replace(large, length=240 * 1024, batch=1, gpus=1)
    fitting = [change.total <= near.device.memory for change in helpful_changes(near)]
    assert fitting == [True, True, False]
    assert [change.other_result for change in helpful_changes(near)] == [False, True, False]


def test_devices_share_rows_weights_and_optimiser(large):
    base = dataclasses.replace(large, batch=1)
    by = {name: predict_memory(dataclasses.replace(base, **change)) for name, change in {
        "alone": {}, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3, "live": 0}, "rows": {"sp_size": 4},
    }.items()}  # fmt: skip
    assert by["zero2"].weights == by["alone"].weights and by["zero2"].adapter < by["alone"].adapter / 2
    assert by["zero3"].weights < by["alone"].weights / 4
    assert by["rows"].kept == by["alone"].kept / 4 and by["rows"].mlp == by["alone"].mlp / 4


def test_groups_that_do_not_divide_the_heads_are_refused(large):
    with pytest.raises(ValueError, match=r"28 query heads and 4 KV heads.*got 8: choose one of 1, 2, 4"):
        plan_run(quickstart(), large.shape, large.device, 8, sp_size=8)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("qwen")
    QWEN_7B.save_pretrained(directory)
    return directory


def test_the_command_says_what_fits_and_what_to_change(qwen, tmp_path, capsys):
    from launch.estimate import estimate

    def options(**changes) -> argparse.Namespace:
        model = [f"model.name_or_path={qwen}"]
        given = {"config": "qa.yaml", "set": model, "gpus": 8, "device": "h100"}
        rest = {"sp_size": None, "zero_stage": None, "json": None}
        return argparse.Namespace(**(given | rest | changes))

    assert estimate(options(json=str(tmp_path / "plan.json")))
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["fits"] and numbers["plan"]["zero_stage"] == 2 and numbers["plan"]["bytes"] == 2
    assert 16 < numbers["lrsa"]["memory_gib"]["total"] < 79 and "It fits" in capsys.readouterr().out
    assert numbers["lrsa"]["memory_gib"]["total"] > numbers["dense"]["memory_gib"]["total"] > 16
    assert explain(lambda: estimate(options(sp_size=3))) == 2
    assert "sp_size must divide 8 devices" in capsys.readouterr().err


def test_the_exit_status_of_a_run_that_does_not_fit(qwen):
    changes = [f"model.name_or_path={qwen}", "data.context_length=1048576"]
    arguments = ["--config", "qa.yaml", "--gpus", "8", "--device", "h100", "--set", *changes]
    done = launch_here(ROOT, "launch/estimate.py", *arguments)
    assert done.returncode == 3, done.stderr
    assert "It does not fit" in done.stdout and "parallel.sp_size=2: " in done.stdout


def test_the_documented_table_holds_what_is_predicted():
    documented = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shape, lrsa = shape_from_config(QWEN_7B, quickstart()), LRSAConfig(sink_size=16, lag_size=512, top_k=128)
    settings = {"1 GPU": {}, "8 GPUs, ZeRO-3": {"gpus": 8, "zero_stage": 3}, "8 GPUs, ZeRO-3, sp_size 4": {
        "gpus": 8, "zero_stage": 3, "sp_size": 4}}  # fmt: skip
    for length in (32, 128, 512):
        for name, values in settings.items():
            plan = Plan(shape, DEVICES["h100"], lrsa, length * 1024, selection=True, **values)
            sides = plan, plan.dense(), dataclasses.replace(plan, offloading=True)
            cells = " | ".join(f"{predict_memory(side).total / 2**30:.0f}" for side in sides)
            row = f"| {length}k | {name} | {cells} |"
            assert row in documented, f"predicted: {row}"


def test_out_of_memory_is_answered_with_settings_that_help(tmp_path, capsys):
    """A real one: this process may take 256 MiB more, and TRL's tile of logits alone needs 512."""
    from train.run import run

    settings = load_settings("quickstart.yaml", [
        f"train.output_dir={tmp_path / 'run'}", "train.deepspeed=null", "train.max_steps=1", "data.synthetic.rows=32",
        "data.eval_rows=4", "eval.enabled=false", "eval.control=false",
    ])  # fmt: skip
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, before[1]))
    try:
        assert explain(lambda: run(settings)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    told = capsys.readouterr()
    assert "peak working set (loss)" in " ".join(told.out.split()), "the banner says it before"
    assert "Out of memory: " in told.err and told.err.count("  --set ") == 3
    assert "--set train.per_device_train_batch_size=1 train.gradient_accumulation_steps=16: 0.0" in told.err
