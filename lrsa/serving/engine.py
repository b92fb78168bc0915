"""The engine: one thread that reads prompts and writes answers, all running requests in one batch of compressed caches.

Every row of an `LRSACache` is independent of the others, so a request joins the batch once its prompt is read, and
leaves it with its own row of the cache. The row is kept: a prompt that begins with what it has read continues it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsa.cache import CACHE_ARGUMENT, LRSACache
from lrsa.hf.layers import is_recurrent
from lrsa.serving.request import Request, Sampling, Usage

logger = logging.getLogger(__name__)


class Engine:
    """Generates answers for many requests at a time.

    Args:
        model, tokenizer, new_cache: as `lrsa.load` returns them.
        max_batch: requests that are answered at the same time; others wait.
        max_conversations: caches of finished requests that are kept, the most recently used ones.
        prefill_chunk: tokens of a prompt that are read at a time, between two steps of the running answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        new_cache: Callable[[], LRSACache],
        *,
        max_batch: int = 8,
        max_conversations: int = 32,
        prefill_chunk: int = 2048,
    ):
        self.model, self.tokenizer, self.new_cache = model, tokenizer, new_cache
        self.max_batch, self.max_conversations, self.prefill_chunk = max_batch, max_conversations, prefill_chunk
        if is_recurrent(model.config.get_text_config()) and max_batch > 1:
            logger.warning("%s has recurrent states: requests are answered one at a time", type(model).__name__)
            self.max_batch = 1
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in [*ends, tokenizer.eos_token_id] if end is not None}
        self._changed = threading.Condition()  # a request has come, or the engine is to end
        self._caches = threading.Lock()  # held while a step changes them
        self._waiting: deque[Request] = deque()
        self._reading: Request | None = None  # its prompt is being read
        self._running: list[Request] = []  # row `i` of the batch belongs to request `i`
        self._batch: LRSACache | None = None
        self._kept: list[tuple[list[int], LRSACache]] = []  # the most recently used last
        self._closed, self._number = False, 0
        self._thread = threading.Thread(target=self._run, name="lrsa-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], sampling: Sampling, send: Callable[[str | None], object]) -> Request:
        """Queue a request; `send` is called from the engine's thread with each part of the answer, then with `None`.

        Raises:
            ValueError: when the prompt is empty, or leaves no room for an answer within the model's positions.
        """
        if not prompt:
            raise ValueError("the prompt has no tokens.")
        if self.positions is not None and len(prompt) + sampling.max_new_tokens > self.positions:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and the answer may have {sampling.max_new_tokens}, together more "
                f"than the model's {self.positions} positions: shorten the prompt or lower max_tokens."
            )
        with self._changed:
            self._number += 1
            request = Request(self._number, prompt, sampling, send)
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """End the thread; running requests end as cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def caches(self) -> tuple[dict[int, tuple[int, int]], list[tuple[int, int]]]:
        """Bytes that each cache holds, and that a full one would: of running requests by number, and of kept ones."""
        with self._caches:
            numbers = [request.number for request in self._running]
            running = dict(zip(numbers, row_bytes(self._batch), strict=True)) if numbers else {}
            if self._reading is not None and self._reading.read:
                running[self._reading.number] = row_bytes(self._reading.cache)[0]
            return running, [row_bytes(cache)[0] for _, cache in self._kept]

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._reading or self._running):
                    self._changed.wait()
                if self._closed:
                    break
                ready = self._reading is None and len(self._running) < self.max_batch
                request = self._waiting.popleft() if ready and self._waiting else None
            if request is not None:
                with self._caches:
                    self._reading = self._begin(request)
            for step in (self._read, self._decode):
                try:
                    with self._caches:
                        step()
                except Exception as error:  # of one model on one input: the server goes on, the clients are told
                    logger.exception("a step of the engine failed")
                    self._fail(f"{error}")
        self._fail("the server was stopped")

    def _begin(self, request: Request) -> Request:
        """Give a request the cache of the conversation that it continues, or a new one."""
        continued = [
            number for number, (tokens, _) in enumerate(self._kept)
            if len(tokens) < len(request.prompt) and request.prompt[: len(tokens)] == tokens
        ]  # fmt: skip
        if continued:
            longest = max(continued, key=lambda number: len(self._kept[number][0]))
            tokens, request.cache = self._kept.pop(longest)
            request.read = request.cached = len(tokens)
        else:
            request.cache = self.new_cache()
        return request

    def _read(self) -> None:
        """Read the next part of a prompt; at its end the request joins the batch with the first token of its answer."""
        request = self._reading
        if request is None:
            return
        if request.reason is None:
            part = request.prompt[request.read : request.read + self.prefill_chunk]
            logits = self._forward([part], [request.read], request.cache)
            request.read += len(part)
            if request.read < len(request.prompt):
                return
            request.take(request.choose(logits[0]), self._ends, self._text)
        self._reading = None
        if request.reason:
            self._finish(request, request.cache)
            return
        if self._batch is None:
            self._batch = request.cache
        else:
            self._batch.append_rows(request.cache)
        request.cache = None
        self._running.append(request)

    def _decode(self) -> None:
        """One token more for every running request."""
        if not self._running:
            return
        tokens = [request.answer[-1:] for request in self._running]
        logits = self._forward(tokens, [request.read for request in self._running], self._batch)
        for row, request in enumerate(self._running):
            request.read += 1
            if request.reason is None:
                request.take(request.choose(logits[row]), self._ends, self._text)
        stay = [row for row, request in enumerate(self._running) if request.reason is None]
        if len(stay) == len(self._running):
            return
        alone = self._batch if len(self._running) == 1 else None
        done = [
            (request, alone or self._batch.rows([row])) for row, request in enumerate(self._running) if request.reason
        ]
        self._batch = self._batch.rows(stay) if stay else None
        self._running = [self._running[row] for row in stay]
        for request, cache in done:
            self._finish(request, cache)

    def _forward(self, tokens: list[list[int]], starts: list[int], cache: LRSACache) -> torch.Tensor:
        """Logits `[B, V]` behind the last of each row's new tokens, as many in every row."""
        ids = torch.tensor(tokens, device=self.model.device)
        positions = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        options = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=ids, position_ids=positions, **options).logits[:, -1]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _finish(self, request: Request, cache: LRSACache) -> None:
        """Keep what the request has read, and tell whoever waits for it."""
        held, full = row_bytes(cache)[0] if cache.layers else (0, 0)
        request.usage = Usage(len(request.prompt), len(request.answer), request.cached, held, full)
        if request.read and self.max_conversations:
            self._kept.append((request.tokens, cache))
            del self._kept[: -self.max_conversations]
        request.cache = None
        request.send(None)

    def _fail(self, text: str) -> None:
        """End all requests with an error; their caches may hold half a step."""
        with self._caches:
            requests = [*self._running, *([self._reading] if self._reading else [])]
            self._running, self._reading, self._batch = [], None, None
        while self._closed and self._waiting:
            requests.append(self._waiting.popleft())
        for request in requests:
            request.reason, request.error, request.cache = "error", text, None
            request.send(None)


def row_bytes(cache: LRSACache) -> list[tuple[int, int]]:
    """Of each row of a cache, bytes of the keys and values that it holds, and of all those that it has seen."""
    rows = [[0, 0] for _ in next(layer.seen for layer in cache.layers if hasattr(layer, "seen"))]
    for layer in cache.layers:
        if not hasattr(layer, "seen"):
            continue
        token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))
        for row, held, seen in zip(rows, layer.held(), layer.seen, strict=True):
            row[0] += held * token
            row[1] += seen * token
    return [(held, full) for held, full in rows]
