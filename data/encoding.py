"""Token ids of the texts of a run: our markup becomes control tokens, the same letters in data stay letters.

`<|im_end|>` or `</s>` in a passage would otherwise end a turn in the middle of it. Markup is marked before it is joined
with data (`Encoder.markup`), and a copy of the tokenizer that knows only the marks as control tokens reads the rest.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from data.sources.files import DataError

_OPEN, _CLOSE, _HIDE, _SHOW = (
    "\ufdd0",
    "\ufdd1",
    "\ufdd2",
    "\ufdd3",
)  # code points that Unicode keeps free for such internal use


class Encoder:
    """Encodes texts that join markup and data.

    Attributes:
        written: control tokens that `count` met in data, and how often.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._ids = {token.content: number for number, token in added.items() if token.special}
        self._marks = {token: f"{_OPEN}{number}{_CLOSE}" for token, number in self._ids.items()}
        self._tokens = {mark: token for token, mark in self._marks.items()}
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self.control_tokens = self._pattern = re.compile("|".join(longest_first) or "(?!)")
        self.written: Counter[str] = Counter()

    def markup(self, text: str) -> str:
        """`text` with its control tokens marked as such."""
        return self._pattern.sub(lambda found: self._marks[found[0]], text)

    def held(self, value):
        """Data, also texts in lists and mappings, with its control tokens hidden, to render a template with."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{_HIDE}{self._ids[found[0]]}{_SHOW}", value)
        if isinstance(value, dict):
            return {key: self.held(item) for key, item in value.items()}
        return [self.held(item) for item in value] if isinstance(value, (list, tuple)) else value

    def rendered(self, text: str) -> str:
        """What a template made of `held` data: its own control tokens as markup, those of the data as letters."""
        return self.shown(self.markup(text))

    def shown(self, text: str) -> str:
        """`text` with what `held` has hidden in it."""
        return re.sub(f"{_HIDE}([0-9]+){_SHOW}", lambda found: self._tokens[f"{_OPEN}{found[1]}{_CLOSE}"], text)

    def tail(self, text: str) -> str:
        """A text from its last control token on: what follows has the same tokens behind it as behind all of it."""
        return text[max(text.rfind(_OPEN), 0) :]

    def plain(self, text: str) -> str:
        """`text` as a model's user would write it, without marks."""
        return re.sub(f"{_OPEN}[0-9]+{_CLOSE}", lambda found: self._tokens[found[0]], text)

    def count(self, texts: Iterable[str]) -> None:
        """Add the control tokens that are written in these data texts to `written`."""
        for text in texts:
            self.written.update(self._pattern.findall(text))

    def notes(self) -> list[str]:
        """What `count` found, for the data report."""
        if not self.written:
            return []
        listed = ", ".join(f"{count} x {token}" for token, count in self.written.most_common(5))
        return [f"control tokens that are written in the data ({listed}) are read as ordinary text"]

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text as it stands: nothing is added around it.

        Raises:
            DataError: when a text holds a control token that this tokenizer cannot read as letters.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            [self.plain(text) for text in texts], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for number, text in enumerate(texts):
            if self._pattern.search(text):
                encoded[number] = self._ids_as_text(text)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def continued(self, prefixes: Sequence[str], texts: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of each prefix, and those that its text adds when it follows the prefix.

        A tokenizer may treat the start of a text in its own way (SentencePiece puts a blank there), so a text that will
        stand in the middle is tokenized behind what comes before it. Where the seam falls inside a token, the text is
        tokenized alone.
        """
        distinct = list(dict.fromkeys(prefixes))
        ids_of = dict(zip(distinct, self.ids(distinct), strict=True))
        before = [ids_of[prefix] for prefix in prefixes]
        whole = self.ids([prefix + text for prefix, text in zip(prefixes, texts, strict=True)])
        added = [
            ids[len(prefix) :] if np.array_equal(ids[: len(prefix)], prefix) else None
            for prefix, ids in zip(before, whole, strict=True)
        ]
        return before, [self.ids([text])[0] if ids is None else ids for ids, text in zip(added, texts, strict=True)]

    def _ids_as_text(self, text: str) -> list[int]:
        found = self._pattern.search(text)
        around = text[max(found.start() - 20, 0) : found.end() + 20]
        if self._copy is not None:
            tokenizer, original = self._copy
            ids = [original.get(n, n) for n in tokenizer.encode(text, add_special_tokens=False).ids]
            control = set(self._ids.values()) - {self.tokenizer.unk_token_id}  # which stands for unknown letters
            if sum(number in control for number in ids) == text.count(_OPEN):  # those of the markup, and no other
                return ids
        raise DataError(
            f"data: {around!r} holds {found[0]!r}, a control token that this tokenizer cannot read as ordinary text: "
            "remove it from the data, or write it in another way."
        )

    @cached_property
    def _copy(self):
        """A tokenizer whose control tokens are the marks, and our id for each of its added tokens; None without one."""
        from tokenizers import Tokenizer

        if not getattr(self.tokenizer, "is_fast", False):
            return None
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        ids = [token["id"] for token in state["added_tokens"]]
        for token in state["added_tokens"]:
            token["content"] = self._marks.get(token["content"], token["content"])
        copy = Tokenizer.from_str(json.dumps(state))
        new = [copy.token_to_id(token["content"]) for token in state["added_tokens"]]
        original = dict(zip(new, ids, strict=True))
        moved = {there for there, here in original.items() if there != here}
        taken = moved & set(copy.get_vocab(with_added_tokens=False).values())
        return None if taken or len(original) < len(ids) else (copy, original)
