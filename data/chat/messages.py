"""Chats, read from messages of OpenAI or ShareGPT, prompts with completions, and instructions as in Alpaca."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.sources.columns import MESSAGES, chat_advice, chat_layout
from data.sources.files import DataError

NO_ANSWER = "chat without an answer of the assistant"
EMPTY_ANSWER = "chat with an empty answer"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "tool_response": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
REASONING = ("reasoning", "reasoning_content", "thinking")
_KEPT = ("tool_calls", "tool_call_id", "name", *REASONING)


@dataclass(frozen=True)
class Chat:
    """Messages as chat templates take them, up to the last answer.

    Attributes:
        number: of the record, for messages about it.
        messages: `{"role", "content"}` and what else a template reads; tool calls have their arguments as a mapping.
        answers: indices of the messages that are trained.
        options: `tools`, and other values for the template.
        cut: number of oldest turns that are left out.
        part: whether other answers of the chat have rows of their own.
    """

    number: int
    messages: list[dict[str, Any]]
    answers: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    cut: int = 0
    part: bool = False


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion as texts that are used as they stand, without a chat template."""

    number: int
    prompt: str
    text: str


def read_chats(
    records: list[dict[str, Any]], columns: dict[str, str], source: str, dropped: Counter, first: int = 0
) -> list[Chat | Completion]:
    """The chats of records; those without an answer to learn from are counted in `dropped`.

    Args:
        source: what error messages call the records, whose numbers begin at `first`.

    Raises:
        DataError: no such columns, or a record or a message that is no chat; with its number.
    """
    layout = chat_layout(records[0], columns)
    if layout is None:
        known = ", ".join(map(str, records[0]))
        raise DataError(
            f"{source}: no chats in the columns {known}. Kind chat reads messages (or conversations), prompt and "
            f"completion, instruction and output; {chat_advice(records[0])}"
        )
    read, own = {
        "messages": (_messages, ("messages", "role", "content")),
        "prompt": (_completion, ("prompt", "completion", "role", "content")),
        "instruction": (_instruction, ("instruction", "input", "output")),
    }[layout]
    if unread := [name for name in columns if name not in (*own, "system", "tools")]:
        raise DataError(
            f"{source}: data.columns {', '.join(unread)}: these records are read by {', '.join(own)}: leave that out."
        )
    chats = []
    for number, record in enumerate(records, first):
        try:
            chat = read(number, record, columns)
        except ValueError as error:
            raise DataError(f"{source}: record {number}: {error} The record: {str(record)[:200]}") from error
        reason = _nothing_to_train(chat)
        if reason:
            dropped[reason] += 1
        else:
            chats.append(chat)
    return chats


def _nothing_to_train(chat: Chat | Completion) -> str | None:
    if isinstance(chat, Completion):
        return None if chat.text.strip() else EMPTY_ANSWER
    if not chat.answers:
        return NO_ANSWER
    empty = any(
        not (chat.messages[i]["content"] or "").strip() and not chat.messages[i].get("tool_calls") for i in chat.answers
    )
    return EMPTY_ANSWER if empty else None


def _messages(number: int, record: dict, columns: dict[str, str]) -> Chat:
    names = [columns["messages"]] if "messages" in columns else MESSAGES
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if not isinstance(value, list):
        raise ValueError(f"{' or '.join(names)} must be a list of messages, got {value!r:.60}.")
    return _chat(number, record, columns, value)


def _completion(number: int, record: dict, columns: dict[str, str]) -> Chat | Completion:
    prompt, completion = (record.get(columns.get(name, name)) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(number, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(number, record, columns, [*prompt, *completion], first_trained=len(prompt))
    raise ValueError(
        f"prompt and completion must both be texts or both lists of messages, got {prompt!r:.50}, {completion!r:.50}."
    )


def _instruction(number: int, record: dict, columns: dict[str, str]) -> Chat:
    """Alpaca's columns: an input follows its instruction after a blank line; `history` holds earlier turns."""
    values = {}
    for name in ("instruction", "input", "output"):
        values[name] = record.get(columns.get(name, name))
        if not isinstance(values[name], str) and (values[name] is not None or name != "input"):
            raise ValueError(f"{columns.get(name, name)} must be text, got {values[name]!r:.60}.")
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, (list, tuple)) or len(turn) != 2 for turn in history):
        raise ValueError(f"history must hold pairs of instruction and output, got {history!r:.60}.")
    last = ["\n\n".join(filter(None, (values["instruction"], values["input"]))), values["output"]]
    pairs = [
        message
        for said, answer in [*history, last]
        for message in ({"role": "user", "content": said}, {"role": "assistant", "content": answer})
    ]
    return _chat(number, record, {name: columns[name] for name in ("system", "tools") if name in columns}, pairs)


def _chat(number: int, record: dict, columns: dict[str, str], raw: list, first_trained: int = 0) -> Chat:
    system, tools = (record.get(columns.get(name, name)) for name in ("system", "tools"))
    messages, answers = [], []
    for place, message in enumerate(raw):
        try:
            read, trained = _message(message, columns)
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from error
        if read["role"] == "assistant" and place >= first_trained and trained:
            answers.append(place)
        messages.append(read)
    if answers:
        messages = messages[: answers[-1] + 1]
    system = _text(system, "system")
    if system.strip() and (not messages or messages[0]["role"] != "system"):
        messages, answers = [{"role": "system", "content": system}, *messages], [place + 1 for place in answers]
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping, got {options!r:.60}.")
    tools = _parsed(tools, "tools") if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None:
        if not isinstance(tools, list) or not all(map(_tool_name, tools)):
            raise ValueError(f"tools must be a list of JSON schemas of functions with a name, got {tools!r:.60}.")
        options = options | {"tools": _without_none(tools)}
    return Chat(number, messages, answers, options)


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _message(raw: Any, columns: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """A message as templates take it, and whether an answer is trained, for which OpenAI's `weight` is not 0."""
    if not isinstance(raw, dict):
        raise ValueError(f"must be a mapping with role and content, got {raw!r:.60}.")
    role = next((raw[name] for name in (columns.get("role", "role"), "from") if raw.get(name) is not None), None)
    names = (columns.get("content", "content"), "value")
    content = next((raw[name] for name in names if raw.get(name) is not None), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(
            f"unknown role {role!r}; allowed are {', '.join(ROLES)}, under role or from (other names with "
            "data.columns: {role: NAME, content: NAME})."
        )
    message = {"role": ROLES[role.lower()], "content": _text(content)}
    message |= {name: _without_none(raw[name]) for name in _KEPT if raw.get(name)}
    for name in REASONING:
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"{name} must be text, got {message[name]!r:.60}.")
    call = raw.get("function_call") or (message["content"] if role.lower() == "function_call" else None)
    if call:
        message |= {"content": "" if role.lower() == "function_call" else message["content"]}
        message["tool_calls"] = [{"type": "function", "function": _parsed(call, "the function call")}]
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise ValueError(f"tool_calls must be a list, got {message['tool_calls']!r:.60}.")
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    elif content is None:
        raise ValueError(f"has no content ({' or '.join(names)}).")
    if (weight := raw.get("weight")) not in (None, 0, 1):
        raise ValueError(f"weight must be 0 (not trained) or 1, got {weight!r:.60}.")
    return message, weight != 0


def _text(content: Any, what: str = "content") -> str:
    """Text, or OpenAI's parts of type text, joined."""
    if isinstance(content, list):
        kinds = {f"{part.get('type')}" if isinstance(part, dict) else type(part).__name__ for part in content}
        if other := ", ".join(sorted(kinds - {"text"})):
            raise ValueError(f"has parts of type {other}; only text is trained on.")
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{what} must be text, got {content!r:.60}.")
    return content or ""


def _tool_call(call: Any) -> dict[str, Any]:
    """A tool call whose arguments are a mapping: OpenAI writes them as JSON text, which most templates would quote."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call must have a function with name and arguments, got {call!r:.60}.")
    arguments = function.get("arguments") or function.get("parameters") or {}
    function = {"name": function["name"], "arguments": _parsed(arguments, "arguments of a tool call")}
    return {name: call[name] for name in ("id",) if call.get(name)} | {"type": "function", "function": function}


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return _without_none(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON, got {value!r:.60}: {error.msg}.") from error


def _without_none(value: Any) -> Any:
    """Arrow and Parquet fill every mapping of a column with the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
