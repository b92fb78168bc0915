"""The engine answers many requests as it answers each alone; the API says what it does not do."""

import json
import queue
import threading

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import LlamaConfig, LlamaForCausalLM

from lrsa import LRSACache, LRSAConfig, PromptFormat, apply_lrsa
from lrsa.serving.api import Server
from lrsa.serving.bodies import Message
from lrsa.serving.engine import Engine
from lrsa.serving.request import Request, Sampling

LRSA = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
PROMPTS = ["3 4 8 2", "Question: who found the river?\nAnswer: " * 3, "The quick brown fox " * 7, "jumps over the lazy"]


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return apply_lrsa(LlamaForCausalLM(config).double().eval(), LRSA)


@pytest.fixture
def engine(model, byte_tokenizer):
    engine = Engine(model, byte_tokenizer, lambda: LRSACache(LRSA), prefill_chunk=16)
    yield engine
    engine.close()


def ask(engine: Engine, ids: list[int], **sampling) -> tuple[Request, queue.Queue]:
    parts = queue.Queue()
    return engine.submit(ids, Sampling(**{"max_new_tokens": 20} | sampling), parts.put), parts


def finish(asked: tuple[Request, queue.Queue]) -> Request:
    request, parts = asked
    while parts.get(timeout=60) is not None:
        pass
    return request


def alone(model, ids: list[int], tokens: int = 20) -> list[int]:
    out = model.generate(torch.tensor([ids]), past_key_values=LRSACache(LRSA), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_requests_together_are_answered_as_alone(model, engine, byte_tokenizer):
    """Prompts of different lengths join the batch at different times and leave it at different times."""
    prompts = [byte_tokenizer(text)["input_ids"] for text in PROMPTS]
    asked = [ask(engine, ids, max_new_tokens=12 + 4 * number) for number, ids in enumerate(prompts)]
    for number, (ids, request) in enumerate(zip(prompts, map(finish, asked), strict=True)):
        assert request.answer == alone(model, ids, 12 + 4 * number)
        assert request.sent == byte_tokenizer.decode(request.answer, skip_special_tokens=True)
        held, full = request.usage.cache_bytes, request.usage.full_cache_bytes
        seen, kept = len(request.tokens), LRSA.kept_length(len(request.tokens))
        assert held * seen == full * kept and held == kept * 3 * 2 * 2 * 8 * 8


def test_a_conversation_reads_its_new_turn_alone(model, engine, byte_tokenizer):
    first = finish(ask(engine, byte_tokenizer(PROMPTS[1])["input_ids"]))
    ids = first.prompt + first.answer + byte_tokenizer(PROMPTS[2])["input_ids"]
    second = finish(ask(engine, ids))
    assert second.usage.cached_tokens == len(first.prompt) + len(first.answer) - 1
    assert second.answer == alone(model, ids)
    other = finish(ask(engine, [5, *ids]))  # begins otherwise
    assert other.usage.cached_tokens == 0


def test_stop_texts_are_not_sent(engine, byte_tokenizer):
    ids = byte_tokenizer(PROMPTS[0])["input_ids"]
    whole = finish(ask(engine, ids)).sent
    stop = whole[5:8]
    request = finish(ask(engine, ids, stop=(stop,)))
    assert request.sent == whole[: whole.index(stop)] and request.reason == "stop"


def test_sampling_follows_its_seed(engine, byte_tokenizer):
    ids = byte_tokenizer(PROMPTS[0])["input_ids"]
    answers = [finish(ask(engine, ids, temperature=1.5, top_p=0.9, seed=seed)).answer for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


def test_a_cancelled_request_ends(engine, byte_tokenizer):
    begun = threading.Event()
    request = engine.submit(byte_tokenizer(PROMPTS[2])["input_ids"], Sampling(300), lambda part: begun.set())
    assert begun.wait(60)
    request.cancel()
    finish(ask(engine, byte_tokenizer(PROMPTS[0])["input_ids"], max_new_tokens=30))
    assert request.usage.completion_tokens < 300 and request.reason == "cancelled"


def test_an_error_reaches_its_request_and_the_engine_goes_on(model, engine, byte_tokenizer, monkeypatch):
    ids = byte_tokenizer(PROMPTS[0])["input_ids"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda *args: (_ for _ in ()).throw(RuntimeError("no memory")))
        failed = finish(ask(engine, ids))
    assert (failed.reason, failed.error) == ("error", "no memory")
    assert finish(ask(engine, ids)).answer == alone(model, ids)


@pytest.fixture
def client(engine, byte_tokenizer):
    return TestClient(Server(engine, "tiny", PromptFormat.plain(byte_tokenizer), max_tokens=9).app)


def chat(client, **fields):
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": PROMPTS[1]}]} | fields)


def test_chat(client, model, byte_tokenizer):
    answer = chat(client).json()
    ids = byte_tokenizer("<s>" + PROMPTS[1], add_special_tokens=False)["input_ids"]
    text = byte_tokenizer.decode(alone(model, ids, 9), skip_special_tokens=True)
    assert answer["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length", "logprobs": None,
    }  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["usage"]["completion_tokens"] == 9
    assert 0 < answer["usage"]["lrsa"]["cache_bytes"] < answer["usage"]["lrsa"]["full_cache_bytes"]


def test_a_stream_says_the_same(client):
    whole = chat(client).json()
    lines = chat(client, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 9


def test_text_completion(client, model, byte_tokenizer):
    answer = client.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 5}).json()
    ids = byte_tokenizer("<s>" + PROMPTS[0], add_special_tokens=False)["input_ids"]
    assert answer["choices"][0]["text"] == byte_tokenizer.decode(alone(model, ids, 5), skip_special_tokens=True)


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"tools": []}, 400, "tools: is not supported here"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"model": "gpt-4"}, 404, "the model 'gpt-4' is not served here, 'tiny' is"),
        ({"max_tokens": 500}, 400, "more than the model's 512 positions: shorten the prompt or lower max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "this model has no chat template"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "the last message must be the user's"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ],
)
def test_what_is_not_done_is_refused(client, fields, status, text):
    answer = chat(client, **fields)
    assert answer.status_code == status and text in answer.json()["error"]["message"]


def test_metrics(client, engine, byte_tokenizer):
    usage = chat(client).json()["usage"]
    text = client.get("/metrics").text
    assert f"lrsa_cache_bytes {float(usage['lrsa']['cache_bytes'])}" in text
    assert "lrsa_conversations 1.0" in text and 'lrsa_requests_total{kind="length"} 1.0' in text
    begun = threading.Event()
    request = engine.submit(byte_tokenizer(PROMPTS[2])["input_ids"], Sampling(400), lambda part: begun.set())
    assert begun.wait(60) and f'lrsa_request_cache_bytes{{request="{request.number}"}}' in client.get("/metrics").text
    request.cancel()


def test_conversations_by_the_chat_template(engine, byte_tokenizer, monkeypatch):
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    client = TestClient(Server(engine, "tiny", max_tokens=6).app)
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    first = client.post("/v1/chat/completions", json={"messages": turns}).json()
    assert first["usage"]["prompt_tokens"] == len(
        byte_tokenizer("<s>system: Short.</s><s>user: Who?</s><s>assistant: ", add_special_tokens=False)["input_ids"]
    )


def test_a_conversation_leads_to_its_answer_as_in_training(engine, byte_tokenizer, monkeypatch):
    """Templates that think put an empty block before an answer in training, and none into their generation prompt."""
    template = "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'assistant' %}<think></think>{% endif %}"
    template += "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    server = Server(engine, "tiny", PromptFormat.of(byte_tokenizer))
    turns = [Message(role="user", content="Who?"), Message(role="assistant", content="Anna."),
             Message(role="user", content="When? ")]  # fmt: skip
    text = "<s>user: Who?</s><s>assistant: <think></think>Anna.</s><s>user: {}</s><s>assistant: <think></think>"
    assert server.conversation(turns) == text.format("When? "), "the next turn begins with the very same text"
    assert server.conversation(turns[:1]) == "<s>user: Who?</s><s>assistant: <think></think>"
    for short in ("assistant", "a", "s"):  # what stands in the generation prompt as well
        assert server.conversation([*turns[:2], Message(role="user", content=short)]) == text.format(short)
    monkeypatch.setattr(byte_tokenizer, "chat_template", template.replace("m.content", "m.content | trim"))
    assert server.conversation(turns) == text.format("When?")
    assert server.conversation([Message(role="user", content=" Who? ")]) == server.conversation(turns[:1])
