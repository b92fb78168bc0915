"""Text around a prompt and its answer, and token ids of pieces that join to the tokens of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.reading import DataError

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


def token_ids(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (int32) of each text as it stands: nothing is added around it."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def continued_ids(
    tokenizer, prefixes: Sequence[str], texts: Sequence[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of each prefix, and those that its text adds when it follows the prefix.

    A tokenizer may treat the start of a text in its own way (SentencePiece puts a blank there), so a piece that will
    stand in the middle is tokenized behind what comes before it. Where the seam falls inside a token, the text is
    tokenized alone.
    """
    distinct = list(dict.fromkeys(prefixes))
    ids_of = dict(zip(distinct, token_ids(tokenizer, distinct), strict=True))
    before = [ids_of[prefix] for prefix in prefixes]
    whole = token_ids(tokenizer, [prefix + text for prefix, text in zip(prefixes, texts, strict=True)])
    added = [
        ids[len(prefix) :] if np.array_equal(ids[: len(prefix)], prefix) else None
        for prefix, ids in zip(before, whole, strict=True)
    ]
    return before, [
        token_ids(tokenizer, [text])[0] if ids is None else ids for ids, text in zip(added, texts, strict=True)
    ]
