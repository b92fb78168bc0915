"""One request on its way through the engine: what is left to read, how its next token is chosen, what has been sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lrsa.cache import LRSACache


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated; `temperature` 0 takes the most likely token every time."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Usage:
    """What a request has cost.

    Attributes:
        prompt_tokens, completion_tokens: tokens of prompt and answer.
        cached_tokens: of the prompt, which a conversation had read before.
        cache_bytes: keys and values that its cache holds at the end.
        full_cache_bytes: those of all its tokens, which a full cache would hold.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_bytes: int
    full_cache_bytes: int


@dataclass
class Request:
    """A prompt and its answer so far.

    Attributes:
        prompt: token ids.
        send: called with every new part of the text, and at the end with `None` and the request finished; from the
            engine's thread.
        cache: what it has read, one row; None before it starts and while it is part of a batch.
        read: tokens that the cache has taken in.
        reason: why the answer ended: `stop`, `length`, `cancelled`, or `error` with the text in `error`.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    send: Callable[[str | None], object]
    cache: LRSACache | None = None
    read: int = 0
    cached: int = 0
    answer: list[int] = field(default_factory=list)
    sent: str = ""
    reason: str | None = None
    error: str | None = None
    usage: Usage | None = None

    def __post_init__(self):
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.sampling.seed)

    @property
    def tokens(self) -> list[int]:
        """All tokens that the cache has taken in."""
        return (self.prompt + self.answer)[: self.read]

    def cancel(self) -> None:
        """Nobody waits for the answer any more; may be called from any thread."""
        self.reason = self.reason or "cancelled"

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from its logits `[V]`."""
        if not self.sampling.temperature:
            return int(logits.argmax())
        scores = TemperatureLogitsWarper(self.sampling.temperature)(None, logits[None].float().cpu())
        scores = TopPLogitsWarper(self.sampling.top_p)(None, scores) if self.sampling.top_p < 1 else scores
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def take(self, token: int, ends: set[int], decode: Callable[[list[int]], str]) -> None:
        """Add a token to the answer, send the text that it completes, and see whether the answer ends here."""
        self.answer.append(token)
        if token in ends:
            self.reason = self.reason or "stop"
        text = decode(self.answer)
        found = [place for place in (text.find(stop) for stop in self.sampling.stop) if place >= 0]
        if found:
            text, self.reason = text[: min(found)], "stop"
        elif self.reason is None and len(self.answer) >= self.sampling.max_new_tokens:
            self.reason = "length"
        # Half a character, or what may become a stop text, waits for the next token.
        held = 0 if self.reason else max((_begun(text, stop) for stop in self.sampling.stop), default=0)
        ready = text[: len(text) - held] if self.reason else text[: len(text) - held].removesuffix("\ufffd")
        if len(ready) > len(self.sent):
            self.send(ready[len(self.sent) :])
            self.sent = ready


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
