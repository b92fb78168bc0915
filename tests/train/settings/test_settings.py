"""What a right configuration becomes: sections, files, defaults, and the settings that a run stores."""

from __future__ import annotations

import dataclasses
import os

import pytest
from trl import SFTConfig

from lrsa import LRSAConfig
from tests.train.settings.conftest import GOOD
from train.settings.defaults import with_defaults
from train.settings.load import load_settings
from train.settings.schema import LRSA, OURS, TrainSettings
from train.settings.sources import REPOSITORY


def test_a_good_file_and_its_overrides(load):
    settings = load(GOOD, "lrsa.top_k=16", "lora.target_modules=[q_proj, v_proj]", "train.save_strategy=no")
    assert (settings.lrsa.sink_size, settings.lrsa.lag_size, settings.lrsa.top_k) == (4, 64, 16)
    assert settings.lora.target_modules == ["q_proj", "v_proj"]
    assert settings.train.given() == {"max_steps": 3, "learning_rate": 1e-4, "save_strategy": "no"}
    assert settings.train.per_device_train_batch_size == 8, "what is not set has TRL's default"
    assert settings.data.context_length == 512 and settings.eval.rows == 5


def test_an_override_makes_the_sections_it_needs(load):
    text = "model: {name_or_path: gpt2}\ndata: {kind: qa, path: questions.json}\n"
    settings = load(text, "lrsa.top_k=4", "data.columns.question=q", "eval.enabled=false")
    assert settings.lrsa.top_k == 4 and settings.data.columns == {"question": "q"} and not settings.eval.enabled


def test_an_override_reaches_into_a_list(load):
    sources = "  sources:\n  - {kind: qa, path: q.json}\n  - {kind: text, path: a.txt}\n"
    text = GOOD.replace("  kind: qa\n  path: questions.json\n", sources)
    settings = load(text, "data.sources.1.eval_rows=5", "data.sources.0.path=b.json")
    assert [source.eval_rows for source in settings.data.sources] == [200, 5]
    assert [source.path for source in settings.data.sources] == ["b.json", "a.txt"]
    for part in ("2", "text.jsonl", "-1"):
        [told] = load(text, f"data.sources.{part}.eval_rows=5")
        assert told.endswith(f": data.sources is a list: write a number from 0 to 1, got {part.partition('.')[0]}")


def test_files_are_found_from_here_from_the_configuration_and_from_the_repository(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "questions.json").write_text("[]")
    (tmp_path / "there" / "run.yaml").write_text(GOOD + "  control: true\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings("there/run.yaml", ["train.deepspeed=configs/deepspeed/zero2.json"])
    assert settings.data.path == str(tmp_path / "there" / "questions.json")
    assert settings.train.deepspeed.endswith("configs/deepspeed/zero2.json")
    assert load_settings("there/run").data == settings.data, ".yaml may be left out"


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml")))
def test_the_configurations_of_the_repository_load_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(name)
    assert (settings.train.deepspeed or "zero2.json").endswith("zero2.json"), "or one process on a CPU"
    assert settings.lrsa.dense_length < settings.data.context_length
    copy = tmp_path / "mine.yaml"
    copy.write_text((REPOSITORY / "configs" / name).read_text())
    assert load_settings(str(copy)).to_yaml() == settings.to_yaml(), "a copy elsewhere finds what the original finds"


def test_the_stored_settings_load_again_as_the_same(load, tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    settings = with_defaults(load(GOOD))
    assert with_defaults(load(GOOD, "train.packing=true")).train.max_length == 512
    assert settings.train.max_length is None and settings.train.report_to == "none"
    assert settings.model.dtype != "auto"
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    again = with_defaults(load_settings("config.yaml"))
    assert again.to_yaml() == settings.to_yaml()


def test_defaults_give_way_to_what_is_set(load):
    settings = with_defaults(
        load(GOOD, "train.use_cpu=true", "train.gradient_checkpointing=true", "model.dtype=float16")
    )
    assert settings.train.bf16 is False and settings.train.output_dir == "runs/run"
    assert settings.model.dtype == "float16"
    checkpointing = {name: value for name, value in settings.train.given().items() if "checkpointing" in name}
    assert list(checkpointing.values()) == [True]


def test_the_train_section_is_that_of_trl():
    """Every field of SFTConfig is a setting with TRL's default, or says what to use instead, or is ours by name."""
    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    own = {"max_minutes", "early_stopping_patience"}
    assert fields.keys() | own == TrainSettings.model_fields.keys() | TrainSettings.not_here.keys()
    assert not TrainSettings.model_fields.keys() & TrainSettings.not_here.keys()
    for name in TrainSettings.model_fields.keys() - OURS.keys() - own:
        default = fields[name].default
        default = fields[name].default_factory() if default is dataclasses.MISSING else default
        assert getattr(TrainSettings(), name) == default, name


def test_meanings_of_the_lrsa_section_are_those_of_its_fields():
    assert list(LRSA) == [field.name for field in dataclasses.fields(LRSAConfig)]


def test_only_what_is_set_goes_to_trl(load):
    given = with_defaults(load(GOOD, "train.use_cpu=true")).train.given()
    ours = {"output_dir", "use_cpu", "bf16", "packing", "report_to", "logging_steps", "seed"}
    assert {name for name in given if "checkpointing" not in name} == ours | {"max_steps", "learning_rate"}


def test_defaults_for_another_machine(load):
    on_gpu = with_defaults(load(GOOD), use_cpu=False)
    assert on_gpu.train.bf16 and on_gpu.train.activation_checkpointing and on_gpu.model.dtype == "bfloat16"
    on_cpu = with_defaults(load(GOOD), use_cpu=True)
    assert not on_cpu.train.bf16 and not on_cpu.train.activation_checkpointing and on_cpu.model.dtype == "float32"
    assert with_defaults(load(GOOD, "train.fp16=true"), use_cpu=False).model.dtype == "float16"


def test_the_served_ratio_is_a_trained_one(load):
    text = GOOD.replace("data:", "objective:\n  keep_ratios: [1, 0.12]\ndata:")
    assert load(text).lrsa.top_k == 8, "0.12 of 64 is 7.7, which is 8"


def test_a_moved_project_finds_its_files_again(tmp_path, monkeypatch):
    """Local paths in a stored configuration are seen from its folder; those of the same name elsewhere are not."""
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "questions.json").write_text("[]")
    (project / "data" / "part-1.jsonl").write_text("")
    config = GOOD.replace(
        "questions.json", "data/questions.json\n  eval_path: [data/questions.json, data/part-*.jsonl]"
    )
    (project / "run.yaml").write_text(config)
    monkeypatch.chdir(project)
    folder = project / "runs" / "first"
    folder.mkdir(parents=True)
    stored = load_settings("run.yaml").to_yaml(folder)
    assert "path: ../../data/questions.json" in stored
    (folder / "config.yaml").write_text(stored)
    os.rename(project, tmp_path / "moved")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.json").write_text("another one")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    again = load_settings(str(tmp_path / "moved" / "runs" / "first" / "config.yaml"))
    assert again.data.path == str(tmp_path / "moved" / "data" / "questions.json")
    assert again.data.eval_path == [again.data.path, str(tmp_path / "moved" / "data" / "part-*.jsonl")]
