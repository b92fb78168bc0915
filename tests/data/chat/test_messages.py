"""Chats as people have them become the messages that templates take; what is no chat is refused with its number."""

import re
from collections import Counter

import pytest

from data import DataError
from data.chat.messages import EMPTY_ANSWER, NO_ANSWER, Chat, Completion, read_chats

WHO = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]
CALL = {"name": "weather", "arguments": {"city": "Paris"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def read(*records, columns=None, dropped=None):
    return read_chats(list(records), columns or {}, "f.jsonl", Counter() if dropped is None else dropped)


@pytest.mark.parametrize(
    "record, columns",
    [
        ({"messages": WHO}, {}),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Anna."}]}, {}),
        ({"prompt": WHO[:1], "completion": WHO[1:]}, {}),
        ({"instruction": "Who?", "input": "", "output": "Anna."}, {}),
        ({"q": "Who?", "a": "Anna."}, {"instruction": "q", "output": "a"}),
        ({"chat": [{"who": "user", "said": "Who?"}, {"who": "bot", "said": "Anna."}]},
         {"messages": "chat", "role": "who", "content": "said"}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]},
                       {"role": "assistant", "content": "Anna.", "tool_calls": None}]}, {}),
        ({"messages": [*WHO, {"role": "user", "content": "never answered"}]}, {}),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_messages(record, columns):
    assert read(record, columns=columns) == [Chat(0, WHO, [1])]


def test_alpaca_with_input_history_and_system():
    record = {"system": "Be brief.", "instruction": "Sum", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]]}
    [chat] = read(record)
    assert [message["content"] for message in chat.messages] == ["Be brief.", "Hi", "Ho", "Sum\n\n1 2", "3"]
    assert chat.answers == [2, 4] and chat.messages[0]["role"] == "system"
    assert read(record | {"system": [{"type": "text", "text": "Be brief."}]}) == [chat]
    for history in (3, [["Hi"]], "Hi"):
        with pytest.raises(DataError, match="record 0: history must hold pairs of instruction and output, got"):
            read(record | {"history": history})


def test_a_prompt_and_a_completion_as_texts_stay_as_they_are():
    assert read({"prompt": "Who? ", "completion": " Anna"}) == [Completion(0, "Who? ", " Anna")]


def test_the_prompt_s_own_answers_are_not_trained_and_neither_is_weight_0():
    [chat] = read({"prompt": [*WHO, WHO[0]], "completion": WHO[1:]})
    assert chat.answers == [3]
    [chat] = read({"messages": [WHO[0], WHO[1] | {"weight": 0}, *WHO]})
    assert chat.answers == [3]


@pytest.mark.parametrize(
    "call, result",
    [
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": CALL | {"arguments": '{"city": "Paris"}'}}]},
         {"role": "tool", "content": "sunny", "tool_call_id": "a"}),
        ({"role": "assistant", "content": "",
          "tool_calls": [{"function": CALL | {"arguments": {"city": "Paris", "day": None}}}]},
         {"role": "tool", "content": "sunny"}),
        ({"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
         {"from": "observation", "value": "sunny"}),
        ({"role": "assistant", "function_call": CALL}, {"role": "function", "name": "weather", "content": "sunny"}),
    ],
)  # fmt: skip
def test_tool_calls_have_a_mapping_of_arguments(call, result):
    [chat] = read({"messages": [WHO[0], call, result, WHO[1]], "tools": f"[{TOOL}]".replace("'", '"')})
    [found] = chat.messages[1]["tool_calls"]
    assert found["function"] == CALL and chat.messages[1]["content"] == "" and chat.answers == [1, 3]
    assert chat.messages[2]["role"] == "tool" and chat.messages[2]["content"] == "sunny"
    assert chat.options == {"tools": [TOOL]}


def test_what_has_nothing_to_train_is_counted():
    dropped = Counter()
    empty = {"messages": [WHO[0], {"role": "assistant", "content": " "}]}
    assert read({"messages": WHO[:1]}, empty, {"messages": WHO}, dropped=dropped) == [Chat(2, WHO, [1])]
    assert dropped == {NO_ANSWER: 1, EMPTY_ANSWER: 1}


@pytest.mark.parametrize(
    "record, part",
    [
        ({"messages": "Who?"}, "record 1: messages or conversations or conversation must be a list of messages"),
        ({"messages": ["Who?"]}, "record 1: message 0: must be a mapping with role and content, got 'Who?'"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "message 0: unknown role 'boss'; allowed are system"),
        ({"messages": [{"speaker": "user", "text": "x"}]}, "data.columns: {role: NAME, content: NAME}"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: content must be text, got 3"),
        ({"messages": [{"role": "user"}]}, "message 0: has no content (content or value)"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type image_url; only text"),
        ({"messages": [WHO[0], WHO[1] | {"weight": 0.5}]}, "message 1: weight must be 0 (not trained) or 1, got 0.5"),
        ({"messages": WHO, "tools": "{"}, "record 1: tools must be JSON"),
        ({"messages": WHO, "tools": [{"function": {"name": 3}}]}, "tools must be a list of JSON schemas of functions"),
        ({"messages": WHO, "chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping, got [1]"),
        ({"messages": [WHO[1] | {"reasoning_content": 3}]}, "message 0: reasoning_content must be text, got 3"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "message 0: arguments of a tool call must be JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "message 0: tool_calls must be a list, got 3"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content must be text, got [None]"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "message 0: has parts of type []"),
        ({"messages": WHO, "system": 3}, "system must be text, got 3"),
        ({"messages": WHO, "system": ["Be brief."]}, "has parts of type str; only text is trained on"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_with_its_number(record, part):
    with pytest.raises(DataError, match=re.escape(part)) as caught:
        read({"messages": WHO}, record)
    assert str(caught.value).startswith("f.jsonl: record 1: ")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Who?", "chosen": "Anna.", "rejected": "Ben."},
        {"prompt": WHO[:1], "chosen": WHO[1:], "rejected": WHO[1:]},
        {"chosen": WHO, "rejected": WHO},
        {"question": "Who?", "answer": "Anna."},
    ],
)
def test_the_columns_that_a_message_tells_work(record):
    with pytest.raises(DataError, match=r"f\.jsonl: no chats in the columns") as caught:
        read(record)
    line = re.search(r"data\.columns: \{(.*)\}", str(caught.value))[1]
    [chat] = read(record, columns=dict(pair.split(": ") for pair in line.split(", ")))
    assert chat == Completion(0, "Who?", "Anna.") or [m["content"] for m in chat.messages] == ["Who?", "Anna."]


def test_other_columns_lead_to_another_kind():
    with pytest.raises(DataError, match=r"for whole texts set data\.kind: text"):
        read({"text": "x"})
    with pytest.raises(DataError, match=r"set data\.kind: text and data\.columns: \{text: chosen\}"):
        read({"chosen": "Human: x", "rejected": "Human: y"})
    with pytest.raises(DataError, match=r"for questions about a context set data\.kind: qa"):
        read({"question": "x", "context": "y", "answers": "z"})
