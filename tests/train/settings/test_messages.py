"""Every way to write a configuration wrong, with the exact message."""

from __future__ import annotations

import json

import pytest

from tests.train.settings.conftest import GOOD
from train.settings.errors import SettingsError
from train.settings.load import load_settings

SECTIONS = "sections are model, lrsa, lora, objective, data, train, parallel, eval"


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
        "run.yaml:10 data.kind must be one of qa, chat, text, synthetic, got 'tekst'; did you mean text?",
    ),
    "missing key": (
        ("  name_or_path: gpt2", "  revision: main"),
        "run.yaml:1 model.name_or_path must be set: Directory or Hub id of a causal language model.",
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
        "run.yaml:15 train.learning_rat: unknown setting; did you mean learning_rate?",
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
        "checked and without local paths",
    ),
    "a token": (
        ("max_steps: 3", "hub_token: hf_secret"),
        "run.yaml:14 train.hub_token: cannot be set here: launch/publish.py sends a finished run, "
        "checked and without local paths",
    ),
    "rows would be cut": (
        ("max_steps: 3", "max_length: 256"),
        "run.yaml:14 train.max_length must be at least data.context_length (512), got 256: "
        "rows would be cut; remove it",
    ),
    "rows would be split": (
        ("max_steps: 3", "packing_strategy: wrapped"),
        "run.yaml:14 train.packing_strategy must be one of bfd, bfd_split, got 'wrapped'",
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
    "one of several types": (
        ("  r: 8", "  target_modules: [q_proj, 5]"),
        "run.yaml:8 lora.target_modules must be text or a list, got ['q_proj', 5]",
    ),
    "other frameworks' name": (
        ("  rows: 5", "  rows: 5\nparallel:\n  cp_size: 2"),
        "run.yaml:19 parallel.cp_size: cannot be set here: ring context parallelism knows only causal masks, so that "
        "nothing would be compressed; use sp_size",
    ),
    "implementation": (
        ("  name_or_path: gpt2", "  name_or_path: gpt2\n  attention: rectangles"),
        "run.yaml:3 model.attention must be one of auto, reference, native, tiled, cudnn, flex, got 'rectangles'",
    ),
    "a ratio that is served and not trained": (
        ("data:", "objective:\n  keep_ratios: [1, 0.5]\ndata:"),
        "run.yaml:6 lrsa.top_k must be one of the trained 32, 64 (objective.keep_ratios [1.0, 0.5] of lag_size 64), "
        "got 8: change it, or add 0.125 to objective.keep_ratios",
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
        "run.yaml:14 train.max_stepz: unknown setting; did you mean max_steps?",
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
        ("warmup_steps", 10, None),
        ("optim", "adam", "must be one of "),
        ("resume_from_checkpoint", "runs/x", "must be auto, got 'runs/x'"),
    ],
)
def test_trainer_values(load, name, value, problem):
    told = load(GOOD, f"train.{name}={json.dumps(value)}")
    if problem is None:
        assert getattr(told.train, name) == value and type(getattr(told.train, name)) is type(value)
    else:
        [line] = told
        assert line.startswith(f"--set train.{name} {problem}")
