"""Every way to write a configuration wrong, with the exact message; and what a right one becomes."""

from __future__ import annotations

import pytest

from train.settings.defaults import with_defaults
from train.settings.errors import SettingsError
from train.settings.load import RunSettings, load_settings
from train.settings.sources import REPOSITORY
from train.settings.trainer_names import check_trainer_values
from train.settings.yaml_lines import parse

GOOD = """\
model:
  name_or_path: gpt2
lrsa:
  sink_size: 4
  lag_size: 64
  top_k: 8
lora:
  r: 8
data:
  kind: qa
  path: questions.json
  context_length: 512
train:
  max_steps: 3
  learning_rate: 1e-4
eval:
  rows: 5
"""
SECTIONS = "sections are model, lrsa, lora, objective, data, train, parallel, eval"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a text as run.yaml where the test runs and loads it; a failure gives the lines of its message."""
    monkeypatch.chdir(tmp_path)

    def load_text(text: str, *overrides: str) -> RunSettings | list[str]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        try:
            return load_settings("run.yaml", list(overrides))
        except SettingsError as error:
            return str(error).splitlines()

    return load_text


BROKEN = {
    "unknown section": (("lora:\n", "lorra:\n"), f"run.yaml:7 lorra: unknown section; did you mean lora?; {SECTIONS}"),
    "typo in a key": (
        ("  lag_size", "  lag_sise"),
        "run.yaml:5 lrsa.lag_sise: unknown setting; did you mean lag_size?",
    ),
    "unlike any key": (
        ("  sink_size", "  banana"),
        "run.yaml:4 lrsa.banana: unknown setting; allowed are sink_size, lag_size, top_k, value_weight, skip_layers",
    ),
    "key of another section": (
        ("  rows: 5", "  top_k: 5"),
        "run.yaml:17 eval.top_k: unknown setting here; it belongs to section lrsa",
    ),
    "text for a number": (("  r: 8", "  r: many"), "run.yaml:8 lora.r must be a whole number, got 'many'"),
    "fraction for top_k": (
        ("top_k: 8", "top_k: 3.5"),
        "run.yaml:6 lrsa.top_k must be a whole number, got 3.5: write it without quotes or fraction.",
    ),
    "top_k above lag_size": (
        ("top_k: 8", "top_k: 128"),
        "run.yaml:6 lrsa.top_k must be between 1 and lag_size (64), got 128: lower top_k or raise lag_size.",
    ),
    "negative lag_size": (
        ("lag_size: 64", "lag_size: -64"),
        "run.yaml:5 lrsa.lag_size must be at least 1, got -64: raise lag_size.",
    ),
    "default that does not fit": (
        ("lag_size: 64\n  top_k: 8", "lag_size: 16"),
        "run.yaml:3 lrsa.top_k must be between 1 and lag_size (16), got 32: lower top_k or raise lag_size.",
    ),
    "wrong choice": (
        ("kind: qa", "kind: tekst"),
        "run.yaml:10 data.kind must be one of qa, text, synthetic, got 'tekst'; did you mean text?",
    ),
    "missing key": (
        ("  name_or_path: gpt2", "  revision: main"),
        "run.yaml:1 model.name_or_path must be set: directory or Hub id of a causal language model",
    ),
    "number below its bound": (("  rows: 5", "  rows: 0"), "run.yaml:17 eval.rows must be at least 1, got 0"),
    "number in a list": (
        ("  rows: 5", "  keep_ratios:\n  - 0.5\n  - 2.0"),
        "run.yaml:19 eval.keep_ratios.1 must be at most 1, got 2.0",
    ),
    "not true or false": (("  rows: 5", "  control: yes"), "run.yaml:17 eval.control must be true or false, got 'yes'"),
    "nested key": (
        ("kind: qa\n", "kind: qa\n  synthetic: {keyz: 3}\n"),
        "run.yaml:11 data.synthetic.keyz: unknown setting; did you mean keys?",
    ),
    "section that is a value": (
        ("lora:\n  r: 8\n", "lora: 8\n"),
        "run.yaml:7 lora must be a section with indented settings below it, got 8",
    ),
    "trainer's key, misspelt": (
        ("  learning_rate", "  learning_rat"),
        "run.yaml:15 train.learning_rat: unknown setting of TRL's SFTConfig; did you mean learning_rate?",
    ),
    "trainer's key, text for a number": (
        ("max_steps: 3", "max_steps: three"),
        "run.yaml:14 train.max_steps must be a whole number, got 'three'",
    ),
    "trainer's key, owned elsewhere": (
        ("max_steps: 3", "trust_remote_code: true"),
        "run.yaml:14 train.trust_remote_code: cannot be set here: set model.trust_remote_code",
    ),
    "publishing while training": (
        ("max_steps: 3", "push_to_hub: true"),
        "run.yaml:14 train.push_to_hub: cannot be set here: launch/publish.py sends a finished run, "
        "checked and without paths of this machine",
    ),
    "a token": (
        ("max_steps: 3", "hub_token: hf_secret"),
        "run.yaml:14 train.hub_token: cannot be set here: launch/publish.py sends a finished run, "
        "checked and without paths of this machine",
    ),
    "rows would be cut": (
        ("max_steps: 3", "max_length: 256"),
        "run.yaml:14 train.max_length must be at least data.context_length (512), got 256: "
        "rows would be cut; remove it",
    ),
    "rows would be split": (
        ("max_steps: 3", "packing_strategy: wrapped"),
        "run.yaml:14 train.packing_strategy must be bfd or bfd_split, got 'wrapped', which cuts rows in the middle",
    ),
    "missing DeepSpeed file": (
        ("max_steps: 3", "deepspeed: zero9.json"),
        "run.yaml:14 train.deepspeed: no such DeepSpeed file: zero9.json (looked here, in . and in the repository)",
    ),
    "missing model directory": (
        ("gpt2", "./no-such-model"),
        "run.yaml:2 model.name_or_path: no such model directory: ./no-such-model",
    ),
    "missing chat template": (
        ("gpt2", "gpt2\n  chat_template: chat.jinja"),
        "run.yaml:3 model.chat_template: no such file: chat.jinja",
    ),
    "key written twice": (
        ("  r: 8", "  r: 8\n  r: 16"),
        "run.yaml:9 lora.r: written twice, first on line 8; keep one",
    ),
    "YAML syntax": (
        ("lag_size: 64", "lag_size: [64"),
        "run.yaml:6: not valid YAML: expected ',' or ']', but got ':'",
    ),
    "tab": (
        ("  lag_size: 64", "\tlag_size: 64"),
        "run.yaml:5: not valid YAML: a tab cannot start a token; indent with spaces",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file(load, edit, message):
    assert edit[0] in GOOD
    assert load(GOOD.replace(*edit)) == [message]


def test_all_problems_at_once_in_the_order_of_the_file(load):
    text = GOOD.replace("lag_size", "lag_sise").replace("r: 8", "r: x").replace("max_steps", "max_stepz")
    assert load(text, "eval.rows=0", "lrsa.top_k=-1") == [
        "run.yaml:5 lrsa.lag_sise: unknown setting; did you mean lag_size?",
        "run.yaml:8 lora.r must be a whole number, got 'x'",
        "run.yaml:14 train.max_stepz: unknown setting of TRL's SFTConfig; did you mean max_steps?",
        "--set lrsa.top_k must be at least 1, got -1: raise top_k.",
        "--set eval.rows must be at least 1, got 0",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lrsa.top_k=x", "--set lrsa.top_k must be a whole number, got 'x': write it without quotes or fraction."),
        ("lrsa.lag_sise=8", "--set lrsa.lag_sise: unknown setting; did you mean lag_size?"),
        ("top_k=8", "--set top_k=8: write it as section.key=value, such as lrsa.top_k=64"),
        ("lrsa.top_k", "--set lrsa.top_k: write it as section.key=value, such as lrsa.top_k=64"),
        ("lorra.r=8", f"--set lorra: unknown section; did you mean lora?; {SECTIONS}"),
        ("lora.r=[8", "--set lora.r: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("train.bf16=maybe", "--set train.bf16 must be true or false, got 'maybe'"),
    ],
)  # fmt: skip
def test_broken_override(load, override, message):
    assert load(GOOD, override) == [message]


def test_a_conflict_that_an_override_makes_points_at_what_is_wrong_now(load):
    assert load(GOOD, "lrsa.lag_size=4") == [
        "run.yaml:6 lrsa.top_k must be between 1 and lag_size (4), got 8: lower top_k or raise lag_size."
    ]


@pytest.mark.parametrize(("text", "got"), [("", "an empty file"), ("- a\n- b\n", "a list"), ("hello\n", "a str")])
def test_a_file_that_holds_no_sections(load, text, got):
    assert load(text) == [f"run.yaml must hold sections such as model, lrsa and data, got {got}"]


def test_missing_file(load):
    with pytest.raises(SettingsError) as raised:
        load_settings("no-such-run.yaml")
    assert str(raised.value).startswith(
        "--config no-such-run.yaml: no such configuration file, neither here nor in configs/ (which holds "
    )
    assert "qa.yaml" in str(raised.value)


def test_a_directory_that_is_no_model(load, tmp_path):
    (tmp_path / "empty-model").mkdir()
    assert load(GOOD.replace("gpt2", "empty-model")) == [
        "run.yaml:2 model.name_or_path: empty-model holds no config.json, so it is no model"
    ]


def test_a_good_file_and_its_overrides(load):
    settings = load(GOOD, "lrsa.top_k=16", "lora.target_modules=[q_proj, v_proj]", "train.save_strategy=no")
    assert (settings.lrsa.sink_size, settings.lrsa.lag_size, settings.lrsa.top_k) == (4, 64, 16)
    assert settings.lora.target_modules == ["q_proj", "v_proj"]
    assert settings.train == {"max_steps": 3, "learning_rate": 1e-4, "save_strategy": "no"}
    assert settings.data.context_length == 512 and settings.eval.rows == 5


def test_an_override_makes_the_sections_it_needs(load):
    text = "model: {name_or_path: gpt2}\ndata: {kind: qa, path: questions.json}\n"
    settings = load(text, "lrsa.top_k=4", "data.columns.question=q", "eval.enabled=false")
    assert settings.lrsa.top_k == 4 and settings.data.columns == {"question": "q"} and not settings.eval.enabled


def test_files_are_found_from_here_from_the_configuration_and_from_the_repository(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "questions.json").write_text("[]")
    (tmp_path / "there" / "run.yaml").write_text(GOOD + "  control: true\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings("there/run.yaml", ["train.deepspeed=configs/deepspeed/zero2.json"])
    assert settings.data.path == str(tmp_path / "there" / "questions.json")
    assert settings.train["deepspeed"].endswith("configs/deepspeed/zero2.json")
    assert load_settings("there/run").data == settings.data, ".yaml may be left out"


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml")))
def test_the_configurations_of_the_repository_load_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = load_settings(name)
    assert settings.train["deepspeed"].endswith("zero2.json")
    assert settings.lrsa.dense_length < settings.data.context_length
    copy = tmp_path / "mine.yaml"
    copy.write_text((REPOSITORY / "configs" / name).read_text())
    assert load_settings(str(copy)).to_yaml() == settings.to_yaml(), "a copy elsewhere finds what the original finds"


def test_the_stored_settings_load_again_as_the_same(load, tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    settings = with_defaults(load(GOOD))
    assert settings.train["max_length"] == 512 and settings.train["report_to"] == "none"
    assert settings.model.dtype != "auto"
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    again = with_defaults(load_settings("config.yaml"))
    assert again.to_yaml() == settings.to_yaml()


def test_defaults_give_way_to_what_is_set(load):
    settings = with_defaults(
        load(GOOD, "train.use_cpu=true", "train.gradient_checkpointing=true", "model.dtype=float16")
    )
    assert settings.train["bf16"] is False and settings.train["output_dir"] == "runs/run"
    assert settings.model.dtype == "float16"
    checkpointing = {name: value for name, value in settings.train.items() if "checkpointing" in name}
    assert list(checkpointing.values()) == [True]


def test_yaml_scalars_are_those_of_version_1_2():
    text = "a: 1e-4\nb: no\nc: 0x1f\nd: 010\ne: .5\nf: true\ng: ~\nh: 12:30\ni: -3\nj: 2020-01-01\nk:\n"
    values = {"a": 1e-4, "b": "no", "c": "0x1f", "d": "010", "e": 0.5, "f": True, "g": None, "h": "12:30", "i": -3,
              "j": "2020-01-01", "k": None}  # fmt: skip
    assert parse(text).values == values


def test_every_value_has_its_line():
    lines = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\ne: 3\n").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "d"): 5,
                     ("e",): 6}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("learning_rate", 1, None),
        ("learning_rate", 0, "must be above 0, got 0"),
        ("learning_rate", True, "must be a number, got True"),
        ("max_steps", -1, None),
        ("max_steps", 0, "must be at least 1, or -1 to go by num_train_epochs, got 0"),
        ("per_device_train_batch_size", 0, "must be at least 1, got 0"),
        ("bf16", None, None),
        ("bf16", 1, "must be true or false, got 1"),
        ("report_to", ["wandb"], None),
        ("report_to", "none", None),
        ("report_to", 5, "must be text or a list, got 5"),
        ("save_strategy", "epohc", "must be one of no, steps, epoch, best, got 'epohc'; did you mean epoch?"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, None),
        ("seed", 1.5, "must be a whole number, got 1.5"),
        ("max_length", None, None),
    ],
)
def test_trainer_values(name, value, problem):
    assert check_trainer_values({name: value}) == ([] if problem is None else [(name, problem)])


def test_every_setting_is_in_the_help():
    from data.settings import DataSettings
    from lrsa import LRSAConfig
    from train.settings.help import sections_help
    from train.settings.schema import EvalSettings, LoraSettings, ModelSettings, ParallelSettings

    text = sections_help()
    for section in (ModelSettings, LoraSettings, ParallelSettings, EvalSettings, DataSettings):
        assert not [name for name in section.model_fields if f"  {name}" not in text]
    assert not [line for line in text.splitlines() if line.rstrip().endswith("):")], "a setting has no meaning"
    assert all(f"  {name} (" in text for name in LRSAConfig.__dataclass_fields__)
    assert "max_length" in text
