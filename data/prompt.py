"""Text around a prompt and its answer: a chat template's markup, or BOS and EOS."""

from __future__ import annotations

from dataclasses import dataclass

from data.sources.files import DataError

_USER, _ANSWER = "USERTEXTGOESHERE", "ANSWERTEXTGOESHERE"


@dataclass(frozen=True)
class Turn:
    """What stands around the user's text and the answer: chat markup, or BOS and EOS without a chat template.

    Attributes:
        before: up to the user's text; between: from there up to the answer; lead: the blank that belongs to the answer;
        after: what ends the answer, so that the model learns to stop.
    """

    before: str
    between: str
    lead: str
    after: str


def turn_of(tokenizer) -> Turn:
    """How this tokenizer's model meets a prompt and ends its answer.

    The chat template is rendered once, with the answer in place: what stands before the answer is then what the model
    sees at inference, with the empty thinking block that some templates put there.

    Raises:
        DataError: when the chat template cannot be rendered, or changes the text it is given.
    """
    if not tokenizer.chat_template:
        return Turn(before=tokenizer.bos_token or "", between="", lead=" ", after=tokenizer.eos_token or "")
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's author: anything may come out of it
        raise DataError(f"the tokenizer's chat template cannot render a question and an answer: {error}") from error
    if text.count(_USER) != 1 or text.count(_ANSWER) != 1 or text.index(_USER) > text.index(_ANSWER):
        raise DataError(f"the tokenizer's chat template does not show a question and its answer once each: {text!r}")
    before, rest = text.split(_USER)
    between, after = rest.split(_ANSWER)
    prompt_end = between.rstrip(" ")
    return Turn(before, prompt_end, lead=between[len(prompt_end) :], after=after.rstrip() or tokenizer.eos_token or "")
