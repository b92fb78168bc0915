"""The text around a prompt and its answer: made once, stored with the adapter, the same wherever a prompt is made."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from transformers import BatchEncoding
from transformers.utils import cached_file

PROMPT_NAME = "lrsa_prompt.json"
_USER, _ANSWER = "UserTextGoesHere", "AnswerTextGoesHere"  # mixed, for templates that change case
_FORMS = (str, lambda text: [{"type": "text", "text": text}])  # of a message: models that see images want parts
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DATE = datetime(2024, 7, 26)  # for templates that write the day: a prompt shall not change from one day to the next


@dataclass(frozen=True)
class PromptFormat:
    """How a model that was trained here meets a prompt and ends its answer.

    Attributes:
        before: up to the user's text: chat markup, or BOS.
        between: from there up to the answer.
        lead: the blank that belongs to the answer.
        after: what ends the answer, so that the model learns to stop.
        end: id of the token at which generation stops, the last of `after`; None when nothing ends an answer.
    """

    before: str
    between: str
    lead: str
    after: str
    end: int | None

    @classmethod
    def plain(cls, tokenizer) -> PromptFormat:
        """BOS before the prompt and EOS after the answer, as far as the tokenizer has them."""
        return cls(tokenizer.bos_token or "", "", " ", tokenizer.eos_token or "", tokenizer.eos_token_id)

    @classmethod
    def of(cls, tokenizer) -> PromptFormat:
        """That of the tokenizer's chat template, or the plain one without a template.

        The template is rendered once, with the answer in place: what stands before the answer is then what the model
        sees at inference, with the empty thinking block that some templates put there.

        Raises:
            ValueError: when the template cannot be rendered, changes the text it is given, or ends an answer with text
                that is no token of its own, so that nothing would ever stop the model.
        """
        if not tokenizer.chat_template:
            return cls.plain(tokenizer)
        before, between, after = _rendered(tokenizer, 1)
        prompt_end, after = between.rstrip(" "), after.rstrip() or tokenizer.eos_token or ""
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[-1] not in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}:
            raise ValueError(
                f"the tokenizer's chat template ends an answer with {after!r}, which this tokenizer reads as ordinary "
                f"text ({len(ids)} tokens), so that the model could not stop: give a template that ends with "
                f"{tokenizer.eos_token!r} (model.chat_template), or none for plain text."
            )
        return cls(before, prompt_end, between[len(prompt_end) :], after, ids[-1] if ids else None)

    def next_turn(self, tokenizer, separator: str) -> str:
        """What stands between the end of an answer (`after`) and the next question about the same text.

        Args:
            separator: divides the two where there is no chat template.

        Raises:
            ValueError: when the chat template writes earlier answers in another way than the last one.
        """
        if not tokenizer.chat_template:
            return separator
        before, *around, _ = _rendered(tokenizer, 2)
        first, following, second = around
        if (before, first, second) == (self.before, *[self.between + self.lead] * 2) and following.startswith(
            self.after
        ):
            return following[len(self.after) :]
        raise ValueError(
            f"the tokenizer's chat template writes an earlier answer in another way ({first!r}, answer, {following!r}) "
            f"than the last one ({second!r}, answer, {self.after!r})."
        )

    def prompt(self, text: str) -> str:
        """The whole prompt of a user's text."""
        return self.before + text + self.between

    def encode(self, tokenizer, text: str) -> BatchEncoding:
        """The prompt of a user's text as tensors for `generate`, token for token as in training."""
        return tokenizer(self.prompt(text), add_special_tokens=False, return_tensors="pt")

    def add_end_to(self, generation_config) -> None:
        """Let generation stop where training ended answers, beside where it stops already."""
        known = generation_config.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if self.end is not None and self.end not in ends:
            generation_config.eos_token_id = [*ends, self.end]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `lrsa_prompt.json` into `directory`."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (Path(directory) / PROMPT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub) -> PromptFormat | None:
        """That of an adapter, a directory or Hub id; None when none is stored there.

        Args:
            hub: `revision`, `token`, `cache_dir`, `local_files_only` as for `from_pretrained` of transformers.
        """
        file = cached_file(str(source), PROMPT_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        return None if file is None else cls(**json.loads(Path(file).read_text(encoding="utf-8")))


def chat_template(tokenizer, tools: list[dict] | None = None) -> str:
    """The tokenizer's chat template, with a fixed day where it would write today's."""
    template = tokenizer.get_chat_template(tools=tools)
    return _NOW.sub(lambda found: json.dumps(_DATE.strftime(found[2])), template)


def conversation_prompt(tokenizer, prompt: PromptFormat | None, messages: list[dict[str, str]]) -> str:
    """The prompt of a conversation whose last message is to be answered.

    Args:
        prompt: leads to the answer as in training; None: the chat template's own generation prompt does.
        messages: of `role` and `content`.

    Raises:
        ValueError: without a chat template, but for a single message of role user where there is a `prompt`, or when
            the template refuses the messages or changes the last one.
    """
    *earlier, last = messages
    said, single = last["content"], prompt is not None and not earlier and last["role"] == "user"
    if not tokenizer.chat_template:
        if single:
            return prompt.prompt(said)
        raise ValueError(
            "this model has no chat template: only a single message of role user can be answered, or a text."
        )
    reasons = []
    for form in _FORMS:
        try:
            text = _generation_prompt(tokenizer, messages, form)
            marked = _generation_prompt(tokenizer, [*earlier, last | {"content": _USER}], form)
        except Exception as error:  # a template is a program of the model's author: anything may come out of it
            reasons.append(f"refuses these messages: {error}")
            continue
        before, found, after = marked.rpartition(_USER)
        if found and prompt is None:
            return text
        written = text.removeprefix(before).removesuffix(after)
        if found and written.strip() == said.strip():  # templates leave white space around it, or cut it off
            return prompt.prompt(written) if single else before + written + prompt.between
        reasons.append(f"does not write the last message as it is: {text!r:.200}")
    if single:
        return prompt.prompt(said)
    raise ValueError(f"the chat template {reasons[0]}.")


def _generation_prompt(tokenizer, messages: list[dict[str, str]], form) -> str:
    shaped = [message | {"content": form(message["content"])} for message in messages]
    options = {"chat_template": chat_template(tokenizer), "tokenize": False, "add_generation_prompt": True}
    return tokenizer.apply_chat_template(shaped, **options)


def _rendered(tokenizer, turns: int) -> list[str]:
    """What the chat template writes before, between and after the texts of so many questions, each with its answer."""
    marks = [mark + chr(ord("A") + turn) for turn in range(turns) for mark in (_USER, _ANSWER)]
    reason = ""
    for content_of in _FORMS:
        messages = [
            {"role": ("user", "assistant")[place % 2], "content": content_of(mark)} for place, mark in enumerate(marks)
        ]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=chat_template(tokenizer), tokenize=False)
        except Exception as error:  # a template is a program of the model's author: anything may come out of it
            reason = reason or f"cannot render a question and an answer: {error}"
            continue
        around = re.split("|".join(marks), text)
        if re.findall("|".join(marks), text) == marks:
            return around
        reason = f"does not show a question and its answer once each: {text!r}"
    raise ValueError(f"the tokenizer's chat template {reason}")
