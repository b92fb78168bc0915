"""The cache against one forward: any chunks, any padding, real generation."""

import pytest
import torch
from transformers import AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import lrsa.cache
from lrsa import LRSACache, LRSAConfig, apply_lrsa

CONFIG = LRSAConfig(3, 8, 2)
CHUNKS = [
    [CONFIG.dense_length] + [CONFIG.lag_size] * 20,  # as DESIGN defines prefill
    [1] * 100,  # token by token
    [100],  # one shot
    [5, 30, 1, 1, 7, 33, 1, 22],
    [13] * 8,
]


def over_cache(model, ids, chunks, config, mask=None):
    """Logits of `ids`, fed chunk by chunk over a new cache; and that cache."""
    cache, logits, start = LRSACache(config), [], 0
    for size in chunks:
        stop = min(start + size, ids.shape[1])
        if start == stop:
            break
        options = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        with torch.no_grad():
            logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **options).logits)
        start = stop
    return torch.cat(logits, 1), cache


def close(found, expected):
    """fp64 through three to five layers; logits are of size 1 to 30."""
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda c: "-".join(map(str, c[:4])))
def test_one_forward_equals_chunks(random_llama, chunks):
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (2, 100))
    with torch.no_grad():
        expected = model(ids).logits
    found, cache = over_cache(model, ids, chunks, CONFIG)
    close(found, expected)
    assert [layer.held() for layer in cache.layers] == [[CONFIG.kept_length(100)] * 2] * 3
    assert CONFIG.kept_length(100) < 40  # tokens really were dropped
    assert cache.get_seq_length() == 100


def test_other_tokens_kept_are_noticed(random_llama, monkeypatch):
    """The broken variant of the equality above: the cache swaps what its two KV heads keep."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (1, 100))
    with torch.no_grad():
        expected = model(ids).logits
    select = lrsa.cache.select_tokens
    monkeypatch.setattr(lrsa.cache, "select_tokens", lambda *args: lrsa.Selection(select(*args).index.roll(1, dims=1)))
    found, _ = over_cache(model, ids, CHUNKS[0], CONFIG)
    close(found[:, : CONFIG.dense_length], expected[:, : CONFIG.dense_length])
    with pytest.raises(AssertionError):
        close(found, expected)


def test_stories_chunks_and_tokens(stories, shared):
    """A real pretrained model on a real text."""
    config = LRSAConfig(4, 16, 2)
    apply_lrsa(stories, config)
    text = (shared / "data/tinystories_700.jsonl").read_text(encoding="utf-8")[:1500]
    ids = AutoTokenizer.from_pretrained(shared / "models/stories260K")(text, return_tensors="pt").input_ids[:, :300]
    with torch.no_grad():
        expected = stories(ids).logits
    for chunks in ([config.dense_length] + [config.lag_size] * 30, [1] * 300, [300]):
        found, cache = over_cache(stories, ids, chunks, config)
        close(found, expected)
        assert cache.layers[4].held() == [config.kept_length(300)] and config.kept_length(300) < 70
    dense = lrsa.remove_lrsa(stories)
    with torch.no_grad(), pytest.raises(AssertionError):
        close(dense(ids).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunks", [CHUNKS[1], CHUNKS[2], [20, 9, 9, 1, 1, 1, 30, 29]], ids=["tokens", "one", "mixed"])
def test_padded_batch_equals_rows_alone(random_llama, side, chunks):
    model = apply_lrsa(random_llama, CONFIG)
    lengths = [100, 61, 5, 20, 33]
    rows = [torch.randint(0, 48, (1, length)) for length in lengths]
    ids, mask = torch.zeros(2, len(rows), 100, dtype=torch.long)
    for row, (length, tokens) in enumerate(zip(lengths, rows, strict=True)):
        part = slice(100 - length, 100) if side == "left" else slice(0, length)
        ids[row, part], mask[row, part] = tokens[0], 1
    with torch.no_grad():
        alone = [model(tokens).logits[0] for tokens in rows]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        forward = model(ids, attention_mask=mask, position_ids=positions).logits
    found, cache = over_cache(model, ids, chunks, CONFIG, mask)
    for row, expected in enumerate(alone):
        close(forward[row][mask[row] == 1], expected)
        close(found[row][mask[row] == 1], expected)
    assert cache.layers[0].held() == [CONFIG.kept_length(length) for length in lengths]


def test_mask_ignored_is_noticed(random_llama, monkeypatch):
    """The broken variant: padding counted as tokens, as with an attention whose mask function is not registered."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (1, 60))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    mask = (torch.arange(69) >= 9).long()[None]
    options = {"attention_mask": mask, "position_ids": torch.arange(-9, 60)[None]}
    with torch.no_grad():
        expected = model(ids).logits
        close(model(padded, past_key_values=LRSACache(CONFIG), **options).logits[:, 9:], expected)
        monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "lrsa")
        with pytest.raises(AssertionError):
            close(model(padded, past_key_values=LRSACache(CONFIG), **options).logits[:, 9:], expected)


def generate(model, ids, mask, config, **options):
    return model.generate(
        ids,
        attention_mask=mask,
        past_key_values=LRSACache(config),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )[:, ids.shape[1] :]


@pytest.mark.parametrize("chunk", [None, 8, 11])
def test_generate_in_a_left_padded_batch(random_llama, chunk):
    model = apply_lrsa(random_llama, CONFIG)
    lengths = [70, 41, 5, 19]
    ids, mask = torch.zeros(2, 4, 70, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 70 - length :], mask[row, 70 - length :] = torch.randint(1, 48, (length,)), 1
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    together = generate(model, ids, mask, CONFIG, **options)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 70 - length :]
        assert torch.equal(generate(model, alone, torch.ones_like(alone), CONFIG), together[row : row + 1])
    # what generation should be: the most likely token after each prefix, by one forward
    with torch.no_grad():
        whole = torch.cat([ids[:1], together[:1]], 1)
        assert torch.equal(model(whole).logits[:, 69:-1].argmax(-1), together[:1])
    everything = generate(model, ids, mask, CONFIG.replace(top_k=8))
    assert not torch.equal(everything, together)  # compression did change something


def test_beam_search(random_llama):
    """Beams reorder the cache: the found text must have the score that one forward gives it."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(1, 48, (2, 50))
    found = model.generate(
        ids,
        past_key_values=LRSACache(CONFIG),
        num_beams=3,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        log = model(found.sequences).logits[:, 49:-1].log_softmax(-1)
    score = log.gather(2, found.sequences[:, 50:, None]).sum((1, 2))
    close(found.sequences_scores, score.to(found.sequences_scores.dtype))


def test_skip_layers_stay_dense(random_llama):
    config = CONFIG.replace(skip_layers=(0, 2))
    model = apply_lrsa(random_llama, config)
    ids = torch.randint(0, 48, (1, 100))
    with torch.no_grad():
        expected = model(ids).logits
    for chunks in CHUNKS:
        found, cache = over_cache(model, ids, chunks, config)
        close(found, expected)
        assert [layer.held() for layer in cache.layers] == [[100], [CONFIG.kept_length(100)], [100]]


def test_memory_of_dropped_tokens_is_released(random_llama):
    """Bytes of the storage, not of a view; and the buffer stays flat per kept token while decoding."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (1, 400))
    _, cache = over_cache(model, ids, [400], CONFIG)
    layer, per_token = cache.layers[0], 2 * 8 * 8  # two KV heads of eight fp64 channels
    assert layer.keys.untyped_storage().nbytes() == CONFIG.kept_length(400) * per_token
    _, cache = over_cache(model, ids, [1] * 400, CONFIG)
    assert cache.layers[0].keys.untyped_storage().nbytes() <= (CONFIG.kept_length(400) + 80) * per_token


def test_wrong_use_is_named(random_llama):
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (2, 30))
    _, cache = over_cache(model, ids, [30], CONFIG)
    with pytest.raises(ValueError, match="holds a batch of 2, got 1 rows"), torch.no_grad():
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(10)
    lrsa.remove_lrsa(model)
    with pytest.raises(ValueError, match="attention is not 'lrsa'"):
        over_cache(model, ids, [20, 10], CONFIG)
    apply_lrsa(model, CONFIG)
    with pytest.raises(ValueError, match="generates over its own cache"):
        model.generate(ids, max_new_tokens=3)


def test_reset_starts_afresh(random_llama):
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (2, 60))
    first, cache = over_cache(model, ids, [60], CONFIG)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        close(model(ids[:1], past_key_values=cache).logits, first[:1])
