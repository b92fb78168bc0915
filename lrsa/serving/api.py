"""OpenAI's chat and text completions over HTTP, and under `/metrics` what the caches hold."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily

from lrsa.prompt import PromptFormat, conversation_prompt
from lrsa.serving import request as requests
from lrsa.serving.bodies import ChatCompletion, Completion, Message, Sampled
from lrsa.serving.engine import Engine


class Server:
    """The HTTP application of one engine, `Server(...).app`.

    Args:
        engine: answers the requests.
        name: what clients call the model.
        prompt: how training wrote a single question; None without it.
        max_tokens: tokens of an answer when a request does not say.
    """

    def __init__(self, engine: Engine, name: str, prompt: PromptFormat | None = None, max_tokens: int = 256):
        self.engine, self.name, self.prompt, self.max_tokens = engine, name, prompt, max_tokens
        self.registry = CollectorRegistry()
        self.registry.register(self)
        labels = {"labelnames": ["kind"], "registry": self.registry}
        self.tokens = Counter("lrsa_tokens", "tokens by kind: read, read before by the conversation, written", **labels)
        self.finished = Counter("lrsa_requests", "finished requests by the reason of their end", **labels)
        self.app = FastAPI(title="lrsa")
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/completions")(self.complete)
        self.app.get("/v1/models")(self.models)
        self.app.get("/metrics")(self.metrics)
        self.app.get("/health")(lambda: {"status": "ok"})
        self.app.exception_handler(RequestValidationError)(_invalid)

    async def chat(self, body: ChatCompletion, http: Request):
        try:
            text = self.conversation(body.messages)
        except ValueError as error:
            return _refused(f"{error}", "messages")
        limit = body.max_completion_tokens or body.max_tokens
        return await self._answer(body, http, text, limit, Writer(self.name, chat=True))

    async def complete(self, body: Completion, http: Request):
        text = (self.engine.tokenizer.bos_token or "") + body.prompt
        return await self._answer(body, http, text, body.max_tokens, Writer(self.name, chat=False))

    def conversation(self, messages: list[Message]) -> str:
        """The prompt of a conversation, up to the answer as in training.

        Raises:
            ValueError: when the last message is an answer, or as `conversation_prompt`.
        """
        if messages[-1].role == "assistant":
            raise ValueError("the last message must be the user's: the answer to it is what is generated.")
        plain = [{"role": message.role, "content": message.text} for message in messages]
        return conversation_prompt(self.engine.tokenizer, self.prompt, plain)

    async def _answer(self, body: Sampled, http: Request, text: str, limit: int | None, writer: Writer):
        if body.model not in (None, self.name):
            return _refused(f"the model {body.model!r} is not served here, {self.name!r} is", "model", status=404)
        ids = self.engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if limit is None:
            room = [] if self.engine.positions is None else [self.engine.positions - len(ids)]
            limit = max(1, min([self.max_tokens, *room]))
        try:
            request = self.engine.submit(
                ids, body.sampling(limit), lambda part: loop.call_soon_threadsafe(parts.put_nowait, part)
            )
        except ValueError as error:
            return _refused(f"{error}", "max_tokens")
        if body.stream:
            events = self._events(request, parts, writer, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        while await self._next(request, parts, http) is not None:
            pass
        self._count(request)
        if request.reason == "error":
            return JSONResponse({"error": {"message": request.error, "type": "server_error"}}, status_code=500)
        return JSONResponse(writer.whole(request))

    async def _next(self, request: requests.Request, parts: asyncio.Queue, http: Request) -> str | None:
        """The next part of the answer; a request whose client has gone is cancelled."""
        while True:
            try:
                return await asyncio.wait_for(parts.get(), timeout=1)
            except TimeoutError:
                if await http.is_disconnected():
                    request.cancel()

    async def _events(self, request, parts: asyncio.Queue, writer: Writer, usage: bool) -> AsyncIterator[str]:
        """Server-sent events, one for each part of the answer."""
        try:
            while (part := await parts.get()) is not None:
                yield writer.event(part)
            if request.reason == "error":
                yield f"data: {JSONResponse({'error': {'message': request.error}}).body.decode()}\n\n"
            else:
                yield writer.event("", request)
                if usage:
                    yield writer.event("", request, usage=True)
            yield "data: [DONE]\n\n"
        finally:
            request.cancel()  # does nothing to a finished one
            self._count(request)

    def _count(self, request: requests.Request) -> None:
        self.finished.labels(request.reason).inc()
        if request.usage is not None:
            self.tokens.labels("read").inc(request.usage.prompt_tokens - request.usage.cached_tokens)
            self.tokens.labels("read_before").inc(request.usage.cached_tokens)
            self.tokens.labels("written").inc(request.usage.completion_tokens)

    def models(self) -> dict:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "lrsa"}]}

    def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What `/metrics` reads off the engine, the cache of every running request among it."""
        running, kept = self.engine.caches()
        counts = {
            "waiting": ("requests that wait", self.engine.waiting),
            "running": ("requests that are answered now", len(running)),
            "conversations": ("finished requests whose cache is kept for their next turn", len(kept)),
        }
        for name, (text, value) in counts.items():
            yield GaugeMetricFamily(f"lrsa_{name}", text, value=value)
        for place, name in enumerate(("cache_bytes", "full_cache_bytes")):
            text = "keys and values held" if place == 0 else "what full caches of the same tokens would hold"
            total = sum(sizes[place] for sizes in [*running.values(), *kept])
            yield GaugeMetricFamily(f"lrsa_{name}", f"{text}, all requests", value=total)
            family = GaugeMetricFamily(f"lrsa_request_{name}", f"{text}, by running request", labels=["request"])
            for number, sizes in running.items():
                family.add_metric([f"{number}"], sizes[place])
            yield family


class Writer:
    """Answers as OpenAI's clients read them."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self, request: requests.Request) -> dict:
        text = {"message": {"role": "assistant", "content": request.sent}} if self.chat else {"text": request.sent}
        choice = {"index": 0, **text, "finish_reason": request.reason, "logprobs": None}
        return {**self.head, "choices": [choice], "usage": _usage(request)}

    def event(self, part: str, finished: requests.Request | None = None, usage: bool = False) -> str:
        """One event: a part of the text, the end, or what the request has cost."""
        reason = finished.reason if finished else None
        text = {"delta": {"role": "assistant", "content": part} if part else {}} if self.chat else {"text": part}
        choices = [] if usage else [{"index": 0, **text, "finish_reason": reason, "logprobs": None}]
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        event = {**self.head, "object": kind, "choices": choices, "usage": _usage(finished) if usage else None}
        return f"data: {JSONResponse(event).body.decode()}\n\n"


def _usage(request: requests.Request) -> dict:
    """OpenAI's fields, and under `lrsa` the bytes of the cache."""
    usage = asdict(request.usage)
    cached, held, full = (usage.pop(name) for name in ("cached_tokens", "cache_bytes", "full_cache_bytes"))
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return usage | {"lrsa": {"cache_bytes": held, "full_cache_bytes": full}}


def _refused(text: str, field: str, status: int = 400) -> JSONResponse:
    error = {"message": text, "type": "invalid_request_error", "param": field, "code": None}
    return JSONResponse({"error": error}, status_code=status)


async def _invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    """Which fields are wrong, in OpenAI's form."""
    problems = [(".".join(map(str, problem["loc"][1:])), problem) for problem in error.errors()]
    texts = [
        f"{field}: {'is not supported here' if problem['type'] == 'extra_forbidden' else problem['msg']}"
        for field, problem in problems
    ]
    return _refused("; ".join(texts), problems[0][0])
