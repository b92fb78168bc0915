"""`generate` over the compressed cache, in every way that people call it."""

from functools import partial
from threading import Thread

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer, set_seed

from lrsa import LRSACache, LRSAConfig, apply_lrsa
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.cache.feeding import close, over_cache, padded

CONFIG = LRSAConfig(3, 8, 2)
LENGTHS = [70, 41, 5, 19]  # two of them shorter than what is never compressed
assert LENGTHS[2] < LENGTHS[3] == CONFIG.dense_length


def generate(model, ids, mask=None, config=CONFIG, new=40, **options):
    """The new tokens."""
    options = {CACHE_ARGUMENT: LRSACache(config), "do_sample": False, "pad_token_id": 0} | options
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(ids, attention_mask=mask, max_new_tokens=new, eos_token_id=None, **options)
    return found[:, ids.shape[1] :]


def rows(lengths=LENGTHS):
    torch.manual_seed(1)
    return [torch.randint(1, 48, (length,)) for length in lengths]


@pytest.fixture(params=["compressed", "sliding and compressed"])
def model(random_llama, request):
    if request.param != "compressed":
        random_llama.config.sliding_window = 12
        random_llama.config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return apply_lrsa(random_llama, CONFIG)


def compressed(cache):
    """A layer that does not slide."""
    return next(layer for layer in cache.layers if not layer.is_sliding)


@pytest.mark.parametrize("chunk", [None, 1, 8, 11, 64, 1000])
def test_left_padded_batch(model, chunk):
    ids, mask = padded(rows())
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    together = generate(model, ids, mask, **options)
    for row, tokens in enumerate(rows()):
        assert torch.equal(generate(model, tokens[None])[0], together[row])
    # what generation should be: the most likely token after each prefix, by one forward
    with torch.no_grad():
        whole = torch.cat([ids[:1], together[:1]], 1)
        assert torch.equal(model(whole).logits[:, 69:-1].argmax(-1), together[:1])
    everything = generate(model, ids, mask, CONFIG.replace(top_k=8))
    assert not torch.equal(everything, together)  # compression did change something


def test_sampling_draws_what_one_forward_gives(model):
    """With one seed: the tokens that sampling from one forward over each prefix, without a cache, draws."""
    ids = rows()[0][None]
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    set_seed(3)
    found = generate(model, ids, **options)
    set_seed(3)
    assert torch.equal(generate(model, ids, **{CACHE_ARGUMENT: None}, use_cache=False, **options), found)
    set_seed(4)
    assert not torch.equal(generate(model, ids, **options), found)


def test_return_sequences(model):
    """Each of several samples has the logits that one forward over it gives."""
    ids, mask = padded(rows())
    set_seed(0)
    found = model.generate(
        ids,
        attention_mask=mask,
        **{CACHE_ARGUMENT: LRSACache(CONFIG)},
        num_return_sequences=3,
        max_new_tokens=20,
        do_sample=True,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in found.sequences.tolist()}) == 12
    logits = torch.stack(found.logits, 1)
    for row, sequence in enumerate(found.sequences):
        real = sequence[70 - LENGTHS[row // 3] :]
        with torch.no_grad():
            expected = model(real[None]).logits[0, -21:-1]
        close(logits[row], expected.to(logits.dtype), atol=1e-5)  # generate keeps logits in fp32


@pytest.mark.parametrize("chunk", [None, 7])
def test_beam_search(model, chunk):
    """Beams reorder the cache: the found text must have the score that one forward gives it."""
    ids = torch.randint(1, 48, (2, 50))
    found = model.generate(
        ids,
        **{CACHE_ARGUMENT: LRSACache(CONFIG)},
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        prefill_chunk_size=chunk,
    )
    with torch.no_grad():
        log = model(found.sequences).logits[:, 49:-1].log_softmax(-1)
    score = log.gather(2, found.sequences[:, 50:, None]).sum((1, 2))
    close(found.sequences_scores, score.to(found.sequences_scores.dtype), atol=1e-4)  # scores are added up in fp32


def test_beams_that_are_not_reordered_are_noticed(model, monkeypatch):
    monkeypatch.setattr(LRSACache, "reorder_cache", lambda *args: None)
    with pytest.raises(AssertionError):
        test_beam_search(model, None)


def test_streaming(model, byte_tokenizer):
    ids = rows()[1][None]
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True)
    thread = Thread(target=partial(generate, model, ids, streamer=streamer))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == byte_tokenizer.decode(generate(model, ids)[0])


@pytest.mark.parametrize("chunk", [None, 9])
def test_conversation_over_one_cache(model, chunk):
    """Turn after turn, in a padded batch, each turn of its own length: what one long forward gives."""
    cache = LRSACache(CONFIG)
    history = rows()
    ids, mask = padded(history)
    for turn in range(4):
        new = generate(model, ids, mask, new=15, **{CACHE_ARGUMENT: cache}, prefill_chunk_size=chunk)
        for row, (tokens, answer) in enumerate(zip(history, new, strict=True)):
            history[row] = torch.cat([tokens, answer])
            with torch.no_grad():
                logits = model(history[row][None]).logits
            assert torch.equal(logits[0, -16:-1].argmax(-1), answer)
        said, said_mask = padded(rows([12 + turn, 1, 30, 7]))
        ids = torch.cat([ids, new, said], 1)
        mask = torch.cat([mask, torch.ones_like(new), said_mask], 1)
        history = [torch.cat([old, line]) for old, line in zip(history, rows([12 + turn, 1, 30, 7]), strict=True)]
    assert cache.get_seq_length() == ids.shape[1] - said.shape[1] - 1
    assert max(compressed(cache).held()) < max(map(len, history)) / 2


def test_batch_operations(model):
    """Selecting, repeating and reordering rows of different lengths, then decoding them."""
    ids, mask = padded(rows())
    probe = torch.randint(1, 48, (4, 3))

    def decode(cache, order):
        with torch.no_grad():
            real = torch.cat([mask, torch.ones(4, 3, dtype=torch.long)], 1)[order]
            positions = real.cumsum(1)[:, -3:] - 1
            options = {"attention_mask": real, "position_ids": positions}
            return model(probe[order], **{CACHE_ARGUMENT: cache}, **options).logits

    def filled():
        return over_cache(model, ids, [70], CONFIG, mask)[1]

    plain = decode(filled(), torch.arange(4))
    for name, argument, order in (
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("reorder_cache", torch.tensor([3, 3, 0, 1]), [3, 3, 0, 1]),
    ):
        cache = filled()
        getattr(cache, name)(argument)
        assert compressed(cache).held() == [CONFIG.kept_length(LENGTHS[row]) for row in order]
        close(decode(cache, order), plain[order])
        empty = LRSACache(CONFIG)
        getattr(empty, name)(argument)
    cache = filled()
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache})
    close(decode(cache, torch.arange(4)), plain)


def test_skipped_layers(random_llama):
    config = CONFIG.replace(skip_layers=(1,))
    model = apply_lrsa(random_llama, config)
    cache = LRSACache(config)
    ids = rows()[0][None]
    found = generate(model, ids, **{CACHE_ARGUMENT: cache})
    with torch.no_grad():
        assert torch.equal(model(torch.cat([ids, found], 1)).logits[:, 69:-1].argmax(-1), found)
    assert [layer.held() for layer in cache.layers] == [[CONFIG.kept_length(109)], [109], [CONFIG.kept_length(109)]]


def test_dense_prefill_for_models_trained_otherwise(model):
    ids, mask = padded(rows())
    found = generate(model, ids, mask, **{CACHE_ARGUMENT: LRSACache(CONFIG, prefill="dense")})
    for row, tokens in enumerate(rows()):
        cache = LRSACache(CONFIG, prefill="dense")
        assert torch.equal(generate(model, tokens[None], **{CACHE_ARGUMENT: cache})[0], found[row])
        assert compressed(cache).held() == [CONFIG.kept_length(len(tokens) + 39)]
    first, _ = over_cache(model, ids[:1], [70], CONFIG, prefill="dense")
    with torch.no_grad():
        sparse = model(ids[:1]).logits
        dense = apply_lrsa(model, CONFIG.replace(top_k=8))(ids[:1]).logits
    close(first, dense)
    assert (sparse - dense).abs().max() > 0.1


def test_refused(model, random_llama):
    ids = rows()[0][None]
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": random_llama}):
        with pytest.raises(ValueError, match="assisted decoding takes tokens back"):
            generate(model, ids, **options)
    cache = LRSACache(CONFIG)
    generate(model, ids, **{CACHE_ARGUMENT: cache})
    assert not cache.is_croppable and not LRSACache(CONFIG).is_croppable
    with pytest.raises(ValueError, match="holds a batch of 1, got 2 rows"):
        generate(model, torch.ones(2, 120, dtype=torch.long), **{CACHE_ARGUMENT: cache})


def test_stories_writes_the_same_256_tokens(stories, shared):
    """A real model and real text: one shot, chunks and token by token; alone and in a padded batch of 8."""
    config = LRSAConfig(4, 16, 4)
    model = apply_lrsa(stories, config)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    text = (shared / "data/tinystories_700.jsonl").read_text(encoding="utf-8")
    prompts = [tokenizer(text[at : at + size], return_tensors="pt").input_ids[0] for at, size in PROMPTS]
    assert min(map(len, prompts)) < config.dense_length < max(map(len, prompts))
    alone = generate(model, prompts[0][None], config=config, new=256)
    whole = torch.cat([prompts[0][None], alone], 1)
    with torch.no_grad():
        assert torch.equal(model(whole).logits[:, len(prompts[0]) - 1 : -1].argmax(-1), alone)
    for chunk in (1, 16, 37):
        assert torch.equal(generate(model, prompts[0][None], config=config, new=256, prefill_chunk_size=chunk), alone)
    ids, mask = padded(prompts)
    together = generate(model, ids, mask, config, 256)
    assert torch.equal(together[:1], alone)
    for prompt, answer in zip(prompts, together, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer])[None]).logits
        assert torch.equal(logits[0, len(prompt) - 1 : -1].argmax(-1), answer)
    for chunk in (1, 50):
        assert torch.equal(generate(model, ids, mask, config, 256, prefill_chunk_size=chunk), together)
    everything = generate(model, prompts[0][None], config=config.replace(top_k=16), new=256)
    assert not torch.equal(everything, alone)


PROMPTS = [(0, 600), (3000, 20), (5000, 60), (7000, 400), (9000, 100), (11000, 500), (13000, 250), (15000, 30)]
