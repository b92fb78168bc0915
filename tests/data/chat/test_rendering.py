"""The chat templates that TRL ships: every answer is trained once, with its end, behind what inference shows."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import trl

from data import DataError, DataSettings
from data.chat.messages import read_chats
from data.chat.rows import _Builder
from lrsa import PromptFormat

FOLDER = Path(trl.__file__).parent / "chat_templates"
CALL = {"id": "abcdefghi", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
SCHEMA = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
TALK = {
    "messages": [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Anna."},
        {"role": "user", "content": "When </s> was it?"},
        {"role": "assistant", "content": "Later."},
    ]
}
TOOLS = {
    "messages": [{"role": "user", "content": "Hot?"}, {"role": "assistant", "tool_calls": [CALL]},
                 {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny today"},
                 {"role": "assistant", "content": "Sun."}],
    "tools": [{"type": "function", "function": SCHEMA}],
}  # fmt: skip


@pytest.fixture
def builder(byte_tokenizer, request):
    """Makes rows with the template that the test names."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    text = (FOLDER / f"{request.param}.jinja").read_text()
    names = set(re.findall(r"<[|｜][\w▁]+[|｜]>|<(?:start|end)_of_turn>|<\|?(?:end|turn)[\w|]*>", text))
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(names)})
    tokenizer.chat_template = text
    held = read_chats([TALK], {}, "f", Counter())
    return _Builder(DataSettings(kind="chat", path="x"), tokenizer, PromptFormat.of(tokenizer), [], held)


def trained(builder, record) -> list[str]:
    rows = builder.rows(read_chats([record], {}, "f", Counter()), Counter())
    return [builder.encoder.tokenizer.decode(row.input_ids[row.trained]) for _, _, row in rows]


@pytest.mark.parametrize("builder", ["qwen2_5", "qwen2_5_training", "llama3_1", "gemma", "phi3"], indirect=True)
def test_one_row_has_both_answers(builder):
    [text] = trained(builder, TALK)
    end = re.escape(PromptFormat.of(builder.encoder.tokenizer).after.split("\n")[0])
    assert re.fullmatch(rf"\s*Anna\.{end}\s*Later\.{end}(\n</s>)?", text)


@pytest.mark.parametrize("builder", ["qwen3", "gptoss", "glm4moe", "qwen3_5_think"], indirect=True)
def test_a_template_that_rewrites_history_has_a_row_for_each(builder):
    first, second = trained(builder, TALK)
    end = re.escape(PromptFormat.of(builder.encoder.tokenizer).after)
    assert re.fullmatch(rf"\s*Anna\.{end}", first) and re.fullmatch(rf"\s*Later\.{end}", second)


@pytest.mark.parametrize("builder", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3", "nemotron_3_nano"], indirect=True)
def test_tool_calls_are_trained_with_their_arguments(builder):
    text = "".join(trained(builder, TOOLS))
    assert text.count("weather") == 1 and "Paris" in text and "Sun." in text and "sunny today" not in text


@pytest.mark.parametrize("builder", ["gemma", "llama3", "phi3"], indirect=True)
def test_a_template_without_tools_says_so(builder):
    with pytest.raises(DataError, match=r"record 0: the chat template (leaves out message 1|refuses it)"):
        trained(builder, TOOLS)
