"""Settings that another one leaves without effect are refused, and those are all that a kind of data does not read."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest

from data.chat.messages import read_chats
from data.duplicates import DistinctTexts
from data.mixture import Source
from data.questions import read_questions
from data.settings import DataSettings, SourceSettings
from data.sources.files import DataError
from tests.train.settings.conftest import GOOD
from train.settings.unused import NEEDS

CHANGED = {
    "objective.distillation_temperature=2": "without objective.distillation, which is 0.0: set that, or leave it out",
    "model.double_quantization=false": "without model.quantization: nf4, which is null: set that, or leave it out",
    "data.train_on=last": "without data.kind: chat, which is qa: set that, or leave it out",
    "data.join_documents=true": "without data.kind: text, which is qa: set that, or leave it out",
    "data.synthetic={rows: 5}": "without data.kind: synthetic, which is qa: set that, or leave it out",
    "train.eval_steps=5": "without train.eval_strategy: steps, which is no: set that, or leave it out",
    "train.max_length=4096": "without train.packing, which is false: set that, or leave it out",
    "train.run_name=mine": "without train.report_to, which is none: set that, or leave it out",
    "eval.suite_rows=9": "without eval.suite, which is null: set that, or leave it out",
}


@pytest.mark.parametrize("override", CHANGED)
def test_a_setting_without_effect_is_refused(override, load):
    name = override.partition("=")[0]
    assert load(GOOD, override) == [f"--set {name}: has no effect {CHANGED[override]}"]


def test_what_another_section_leaves_without_effect_is_refused(load, tmp_path):
    text = GOOD.replace("kind: qa", "kind: text")
    [told] = load(text, "eval.metric=loss")
    assert told == "--set eval.metric: has no effect with data.kind: text, whose loss is measured: leave it out"
    suite = load(text, "eval.suite=[passkey_16]", "eval.metric=generation")  # its answers are generated all the same
    assert suite.eval.metric == "generation"
    [told] = load(text, "objective.selection_queries=8")
    assert "without objective.selection: set that" in told
    assert load(text, "objective.selection_queries=8", "objective.selection=1").objective.selection_queries == 8
    [told] = load(GOOD, "data.streaming=true", "train.train_sampling_strategy=group_by_length")
    assert told.startswith("--set train.train_sampling_strategy: has no effect with data.streaming")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    [told] = load(GOOD, "model.name_or_path=model", "model.revision=v2")
    assert told.startswith("--set model.revision: has no effect with a directory")
    [told] = load(GOOD, "lora.init_from=user/adapter", "lora.init_lora_weights=gaussian")
    assert told.startswith("--set lora.init_lora_weights: has no effect with lora.init_from user/adapter")


def test_what_is_switched_off_or_says_the_default_is_accepted(load):
    assert load(GOOD, "train.eval_strategy=no", "train.eval_steps=5").train.eval_steps == 5
    assert load(GOOD, "data.train_on=all", "data.format=squad").data.train_on == "all"
    assert load(GOOD, "objective.distillation=0", "objective.distillation_temperature=2")


def test_every_setting_of_a_source_is_known_to_belong_to_some_kinds_or_to_all(load):
    limited = {name for names, *_ in NEEDS[SourceSettings] for name in names}
    assert limited | {"kind", "path", "eval_rows", "max_rows"} == set(SourceSettings.model_fields)
    [told] = load(GOOD.replace("kind: qa", "kind: text"), "data.questions_per_row=10")
    assert "without data.kind: qa, which is text" in told


def test_two_names_of_one_setting_say_the_same(load):
    older, newer = "train.gradient_checkpointing=true", "train.activation_checkpointing="
    assert load(GOOD, older, newer + "true").train.activation_checkpointing
    [told] = load(GOOD, older, newer + "false")
    assert told.startswith("--set train.gradient_checkpointing: is the older name of activation_checkpointing, which")


def test_the_place_of_one_source_is_told(load):
    sources = "  sources:\n  - {kind: qa, path: q.json}\n  - kind: text\n    path: a.txt\n    too_long: cut\n"
    text = GOOD.replace("  kind: qa\n  path: questions.json\n", sources)
    [told] = load(text)
    assert told == (
        "run.yaml:14 data.sources.1.too_long: has no effect without data.sources.1.kind: chat, which is text: set "
        "that, or leave it out"
    )
    [told] = load(text.replace("    too_long: cut\n", ""), "data.stopping_strategy=all_exhausted")
    assert "stopping_strategy has no effect without weights" in told


class Watched(DataSettings):
    """Notes the settings that are read."""

    def __getattribute__(self, name):
        if name in SourceSettings.model_fields:
            read.add(name)
        return super().__getattribute__(name)


read: set[str] = set()
RECORDS = {
    "qa": {"question": "Who?", "context": "Anna found it.", "answers": "Anna"},
    "chat": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]},
    "text": {"text": "Anna found the river."},
}


@pytest.mark.parametrize("kind", ["qa", "chat", "text", "synthetic"])
def test_every_kind_reads_exactly_the_settings_that_it_may_have(kind, tmp_path, byte_tokenizer):
    values = {"kind": kind, "context_length": 200, "eval_rows": 1}
    tokenizer = copy.deepcopy(byte_tokenizer)  # the fixture is shared and has no template
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    for name in ("path", "eval_path") if kind in RECORDS else ():
        values[name] = str(tmp_path / f"{name}.jsonl")
        with open(values[name], "w", encoding="utf-8") as file:
            for n in range(3):  # the last one is too long
                text = json.dumps(RECORDS[kind]).replace("Anna", f"{name}{n}")
                file.write(text.replace("Who?", "Who? " * (100 if n == 2 else 1)) + "\n")
    settings = Watched(**values)
    read.clear()
    Source("one", settings, tokenizer, 0)
    allowed = {
        name for names, switch, kinds in NEEDS[SourceSettings] if kind in kinds for name in names if switch == "kind"
    }
    limited = {name for names, *_ in NEEDS[SourceSettings] for name in names}
    assert allowed <= read, "a setting that is allowed and not read"
    assert read & limited <= allowed | {"name", "split", "eval_path", "eval_split"}, "these four may be read for None"
    assert read >= {"kind", "path", "eval_rows", "max_rows"}


@pytest.mark.parametrize("sources", [False, True])
def test_files_on_the_command_line_take_the_place_of_a_data_set_with_its_subset(sources, load, tmp_path):
    def of(changes: dict, *overrides: str) -> tuple:
        values = {"kind": "qa", "path": "user/a", "name": "big", "split": "validation", "eval_split": "test"} | changes
        values = {"sources": [values]} if sources else values
        data = load(re.sub(r"data:.*512", f"data: {json.dumps(values)}", GOOD, flags=re.DOTALL), *overrides).data
        [one] = data.each().values()
        return one.name, one.split, one.eval_split

    for name in ("mine.jsonl", "b.jsonl", "folder/mine.jsonl", "saved/state.json", "configured/mine.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "configured" / "README.md").write_text("---\nname: x\nconfigs:\n---\n")
    path = "data.sources.0.path" if sources else "data.path"
    kept = ("big", "validation", "test")
    assert of({}) == kept == of({}, f"{path}=user/other") == of({}, f"{path}=configured")
    for files in ("mine.jsonl", "[mine.jsonl,b.jsonl]", "saved"):
        assert of({}, f"{path}={files}") == (None, "train", None)
        assert of({"eval_path": "user/b"}, f"{path}={files}") == (None, "train", "test")
    assert of({}, f"{path}=folder") == (None, "validation", "test")
    assert of({}, f"{path}=[mine.jsonl,user/other]") == kept
    assert of({}, f"{path}=mine.jsonl", f"{path[:-4]}name=en")[0] == "en", "refused when it is read"
    assert of({}, f"{path[:-4]}eval_path=mine.jsonl") == ("big", "validation", None)


def test_a_directory_on_the_command_line_takes_the_place_of_a_model_with_its_revision(load, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = GOOD.replace("gpt2", "gpt2\n  revision: v2")
    assert load(text).model.revision == "v2" == load(text, "model.name_or_path=user/model").model.revision
    assert load(text, "model.name_or_path=model").model.revision is None


def test_columns_that_a_layout_does_not_read_are_refused(tmp_path):
    for record, columns, told in (
        (RECORDS["chat"], {"prompt": "question"}, "these records are read by messages, role, content"),
        ({"instruction": "a", "output": "b"}, {"role": "from"}, "are read by instruction, input, output"),
    ):
        with pytest.raises(DataError, match=told):
            read_chats([record], columns, "data.path", Counter())
    both = RECORDS["chat"] | {"q": "Where?", "a": "Here."}
    [chat] = read_chats([both], {"instruction": "q", "output": "a"}, "data.path", Counter())
    assert chat.messages[0]["content"] == "Where?", "the columns that are named count"
    with pytest.raises(DataError, match="articles in SQuAD's layout have no such columns"):
        read_questions([{"paragraphs": []}], "squad", {"question": "q"}, "data.path", DistinctTexts(), Counter())
