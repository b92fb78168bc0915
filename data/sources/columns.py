"""The columns of records by our names, and what to set where a file has others."""

from __future__ import annotations

from collections.abc import Sequence

from data.sources.files import DataError

MESSAGES = ("messages", "conversations", "conversation")
# Names that other projects give to the columns of ours.
_OTHERS = {
    "question": ("query", "problem", "instruction", "prompt", "input"),
    "context": ("document", "passage", "article", "documents", "passages", "contexts", "paragraph", "input", "text"),
    "answers": ("answer", "output", "response", "completion", "target", "reply", "label"),
    "text": ("content", "document", "body", "article", "story", "raw_content"),
}


def columns_of(
    records: Sequence[dict], ours: Sequence[str], columns: dict[str, str], source: str, kind: str
) -> list[str]:
    """The file's names of our columns; `source` is what error messages call the records.

    Raises:
        DataError: naming the columns that exist and what to set, when the first record lacks any of them.
    """
    record = records[0]
    names = {name: columns.get(name, name) for name in ours}
    if names.get("answers") == "answers" and "answers" not in record and "answer" in record:  # HotpotQA and many others
        names["answers"] = "answer"
    if all(name in record for name in names.values()):
        return list(names.values())
    missing = ", ".join(repr(name) for name in names.values() if name not in record)
    raise DataError(
        f"{source}: there is no column {missing}; the columns are {', '.join(map(str, record))}. "
        f"{_advice(record, names, kind)}"
    )


def chat_layout(record: dict, columns: dict[str, str]) -> str | None:
    """How a record holds a chat: messages, prompt (completion) or instruction (output); None for none of them."""
    pairs = {"prompt": "completion", "instruction": "output"}
    there = [a for a, b in pairs.items() if columns.get(a, a) in record and columns.get(b, b) in record]
    named = [name for name in there if name in columns or pairs[name] in columns]
    if "messages" in columns or (not named and any(isinstance(record.get(name), list) for name in MESSAGES)):
        return "messages"
    return next(iter(named or there), None)


def chat_advice(record: dict) -> str:
    """What to set for a record in which kind chat finds no chat."""
    if "chosen" in record and "rejected" in record:
        told = "these are pairs for preference training, of which only the chosen answers can be trained on"
        if isinstance(record["chosen"], list):
            ours = "completion" if isinstance(record.get("prompt"), list) else "messages"
            return f"{told}: set data.columns: {{{ours}: chosen}}."
        if "prompt" in record:
            return f"{told}: set data.columns: {{completion: chosen}}."
        return f"{told}: set data.kind: text and data.columns: {{text: chosen}}."
    question, answers = (
        next((n for n in names if n in record), None)
        for names in (("question", "query"), ("answer", "answers", "response"))
    )
    if question and answers:
        more = "for questions about a context set data.kind: qa; " if "context" in record else ""
        return f"{more}for a question and its answer set data.columns: {{instruction: {question}, output: {answers}}}."
    if isinstance(record.get("text"), str):
        return "for whole texts set data.kind: text."
    return (
        "say which columns hold them, for example data.columns: {messages: NAME}, or {instruction: NAME, output: NAME}."
    )


def _advice(record: dict, names: dict[str, str], kind: str) -> str:
    guessed, free = {}, [name for name in record if name not in names.values()]
    for ours, name in names.items():
        found = next((other for other in _OTHERS[ours] if other in free), None)
        if name not in record and found:
            free.remove(found)
        guessed[ours] = name if name in record else found
    layout = chat_layout(record, {})
    if layout:
        chat = {"messages": "chats", "prompt": "prompts and completions", "instruction": "instructions"}[layout]
        advice = f"These are {chat}: set data.kind: chat"
        if layout == "messages" or not all(guessed.values()):
            return f"{advice}."
        return f"{advice}, or, to train on them as {kind}, data.columns: {_written(guessed)}."
    if all(guessed.values()):
        return f"Say which to use with data.columns: {_written(guessed)}."
    if "chosen" in record:
        return f"For kind chat: {chat_advice(record)}"
    return f"Say which to use with data.columns: {_written({ours: name or 'NAME' for ours, name in guessed.items()})}."


def _written(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{ours}: {name}" for ours, name in columns.items() if ours != name) + "}"
