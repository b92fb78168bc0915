"""A chat as one text with the places that are trained, as the tokenizer's chat template writes it.

Where the template marks what the assistant says (`{% generation %}`), its marks count. Elsewhere an answer is what a
rendering up to it has beyond its prompt. A template may write earlier turns in another way than the last, without their
reasoning for instance. Then no single text shows every answer as the model will have to give it, and a chat becomes
several rows, each of which ends with an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from data.chat.messages import REASONING, Chat
from data.encoding import Encoder
from data.sources.files import DataError
from lrsa import PromptFormat
from lrsa.prompt import chat_template

_ANSWER = "ANSWERTEXTGOESHERE"


@dataclass(frozen=True)
class Rendered:
    """A text, the `(start, end)` of what is trained in it, in order, and where the last answer's prompt ends."""

    text: str
    trained: list[tuple[int, int]]
    prompt_end: int


@dataclass(frozen=True)
class _Turn:
    """An answer with all that stands before it: `prompt + answer + after` is a rendering of the chat up to it."""

    prompt: str
    answer: str
    after: str


class Renderer:
    """Renders chats; control tokens that are written in messages stay hidden (`Encoder.held`) in the texts."""

    def __init__(self, encoder: Encoder, turn: PromptFormat):
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.turn, self.end = turn, turn.after
        self.parts = False
        probe = [{"role": "user", "content": _ANSWER}]
        try:
            self.parts = _ANSWER not in self._render(probe, {}, add_generation_prompt=True)[0]
        except Exception:  # a template of a model that sees images, which wants parts
            self.parts = True

    def rows(self, chat: Chat) -> list[Rendered]:
        """One text, or several where the template writes earlier turns differently.

        Raises:
            DataError: when the template refuses the chat or leaves a part of it out.
        """
        messages = self.encoder.held(chat.messages)
        options = self.encoder.held(chat.options)
        try:
            whole, marked = self._render(messages, options)
            self._refuse_left_out(messages, options, whole)
            return self._marked(messages, options, chat.answers, whole, marked) or self._prefixes(
                messages, options, chat.answers
            )
        except _Refused as error:
            raise DataError(f"record {chat.number}: {self.encoder.shown(str(error))}") from error

    def generation_prompt(self) -> PromptFormat:
        """The prompt format whose prompt is the template's own generation prompt, behind which a model reasons."""
        text, _ = self._render([{"role": "user", "content": _ANSWER}], {}, add_generation_prompt=True)
        before, between = text.split(_ANSWER)
        prompt = between.rstrip(" ")
        return replace(self.turn, before=before, between=prompt, lead=between[len(prompt) :])

    def _render(self, messages: list[dict], options: dict, **more) -> tuple[str, list[tuple[int, int]]]:
        template = chat_template(self.tokenizer, options.get("tools"))
        marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        options = {**self.tokenizer.special_tokens_map, **options, **more, "return_assistant_tokens_mask": marks}
        reason = ""
        for form in (_mapping, _json_text):  # of the arguments of tool calls
            try:
                shaped = [form(self._shaped(message)) for message in messages]
                texts, spans = render_jinja_template([shaped], chat_template=template, **options)
                return texts[0], [tuple(span) for span in spans[0]] if marks else []
            except Exception as error:  # a template is a program of the model's author: anything may come out of it
                reason = reason or str(error)
        raise _Refused(f"the chat template refuses it: {reason}")

    def _shaped(self, message: dict) -> dict:
        return message | {"content": [{"type": "text", "text": message["content"]}]} if self.parts else message

    def _marked(self, messages, options, answers: list[int], whole: str, marked) -> list[Rendered]:
        """By the template's own marks, as far as there is one for each message of the assistant."""
        said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(said) != len(marked):
            return []
        spans = [self._with_end(whole, *span) for place, span in zip(said, marked, strict=True) if place in answers]
        start, end = spans[-1]
        try:
            prompt = self._turn(messages, options, answers[-1]).prompt
        except _Refused:
            prompt = ""
        return [Rendered(whole[:end], spans, max(start, len(prompt)) if whole.startswith(prompt) else start)]

    def _with_end(self, whole: str, start: int, end: int) -> tuple[int, int]:
        """The place of an answer with the end of its turn, which templates leave out of their marks."""
        begun = whole[start:end].rstrip()
        if any(begun.endswith(part) for part in self._ends(self.end)):
            return start, start + len(begun)
        found = next((len(part) for part in self._ends(self.end) if whole.startswith(part, end)), 0)
        return start, end + found

    def _prefixes(self, messages, options, answers: list[int]) -> list[Rendered]:
        rows: list[Rendered] = []
        for place in reversed(answers):
            turn = self._turn(messages, options, place)
            begin, done = len(turn.prompt), turn.prompt + turn.answer
            after = next(
                (part for part in self._ends(turn.after) if rows and rows[-1].text.startswith(done + part)), None
            )
            if after is None:
                end = turn.after.rstrip() or self.tokenizer.eos_token or ""
                rows.append(Rendered(done + end, [(begin, len(done + end))], begin))
            else:
                last = rows.pop()
                rows.append(Rendered(last.text, [(begin, len(done + after)), *last.trained], last.prompt_end))
        return rows[::-1]

    def _ends(self, after: str) -> Iterator[str]:
        """How an answer may end, the longest first: with all that follows the last one, or with its first tokens."""
        after = after.rstrip()
        ends = [found.end() for found in self.encoder.control_tokens.finditer(after)]
        return (after[:end] for end in sorted({*ends, *([len(after)] if after else [])}, reverse=True))

    def _turn(self, messages: list[dict], options: dict, place: int) -> _Turn:
        """The answer at `place`, behind the prompt that the model sees at inference (`PromptFormat.of`)."""
        message, before = messages[place], messages[:place]
        whole, _ = self._render(messages[: place + 1], options)
        ending = whole.rstrip()
        last = [found[0] for found in self.encoder.control_tokens.finditer(ending) if found.end() == len(ending)]
        after = next((part for part in [*self._ends(self.end), *last] if ending.endswith(part)), "")
        prompts = []
        if not reasons(message):
            plain = {name: value for name, value in message.items() if name != "tool_calls"} | {"content": _ANSWER}
            text, _ = self._render([*before, plain], options)
            prompts += [text.partition(_ANSWER)[0]] if text.count(_ANSWER) == 1 else []
        prompts += [self._render(before, options, add_generation_prompt=True)[0]]
        for prompt in (prompt.rstrip(" ") for prompt in prompts):
            if whole.startswith(prompt) and len(ending) > len(prompt + after):
                return _Turn(prompt, ending[len(prompt) : len(ending) - len(after)], after)
        raise _Refused(
            f"the chat template writes message {place} in another way than its generation prompt says: "
            f"{whole[-120:]!r} does not continue {prompts[-1][-60:]!r}. Set model.chat_template to a file without "
            "this, or take the reasoning out of the data."
        )

    def _refuse_left_out(self, messages: list[dict], options: dict, text: str) -> None:
        for place, message in enumerate(messages):
            said = [message["content"].rpartition("</think>")[2].strip()]
            said += [call["function"]["name"] for call in message.get("tool_calls", [])]
            for part in said:
                if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
                    raise _Refused(
                        f"the chat template leaves out message {place} (role {message['role']}, {part[:60]!r}): set "
                        "model.chat_template to a file that writes it, or take it out of the data."
                    )
        if (thought := reasoning(messages[-1])) not in text:
            raise _Refused(
                f"the chat template leaves out the reasoning of message {len(messages) - 1} ({thought[:60]!r}): set "
                "model.chat_template to a file that writes it, or take it out of the data."
            )
        for tool in options.get("tools") or []:
            name = tool.get("function", tool)["name"]
            if name not in text:
                raise _Refused(
                    f"the chat template leaves out the tool {name!r}: set model.chat_template to a file that writes it."
                )


class _Refused(ValueError):
    """What a template does not do with a chat."""


def reasoning(message: dict[str, Any]) -> str:
    """What an answer thinks before it says something; most think nothing."""
    named = [message[name] for name in REASONING if message.get(name)]
    return (named or [message["content"].rpartition("</think>")[0].partition("<think>")[2]])[0].strip()


def reasons(message: dict[str, Any]) -> bool:
    """Whether an answer holds reasoning, or the mark of it."""
    return bool(reasoning(message)) or "</think>" in message["content"]


def _mapping(message: dict) -> dict:
    return message


def _json_text(message: dict) -> dict:
    """The message with the arguments of its tool calls as JSON text, as a few templates join them."""
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message
