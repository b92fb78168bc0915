"""A cache that was used before: what goes on from there is right, anything else is refused."""

import pytest
import torch

from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT
from tests.lrsa.cache.feeding import close

CONFIG = LRSAConfig(3, 8, 2)


@pytest.fixture
def model(random_llama):
    return apply_lrsa(random_llama, CONFIG)


def generate(model, ids, cache, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **{CACHE_ARGUMENT: cache}, **options)


@pytest.fixture
def used(model):
    """A cache that has seen a prompt of 70 tokens and an answer but its last token; and both of them."""
    cache = LRSACache(CONFIG)
    return cache, generate(model, torch.randint(1, 48, (1, 70)), cache)


def test_whole_conversation_and_new_turn_are_the_same(model, used):
    cache, history = used
    turn = torch.randint(1, 48, (1, 12))
    whole = torch.cat([history, turn], 1)
    with torch.no_grad():
        logits = model(whole).logits  # of one forward, without a cache
    first = generate(model, torch.cat([history[:, -1:], turn], 1), cache, attention_mask=torch.ones_like(whole))
    assert first[0, 13] == logits[0, -1].argmax()
    whole = torch.cat([history, turn, first[:, 13:], turn], 1)
    with torch.no_grad():
        assert generate(model, whole, cache)[0, whole.shape[1]] == model(whole).logits[0, -1].argmax()


@pytest.mark.parametrize("length", [5, 79, 80, 120])
@pytest.mark.parametrize("chunk", [None, 7])
def test_another_prompt_is_refused(model, used, length, chunk):
    """transformers would cut off as many tokens as the cache has seen, whatever they are."""
    cache, history = used
    ids = torch.randint(1, 48, (1, length))
    ids[0, 0] = (history[0, 0] + 1) % 47
    for mask in (None, torch.ones_like(ids), torch.ones(1, length + 80)):
        message = f"has seen 79 tokens, and the {length} tokens given .*do not go on from there"
        with pytest.raises(ValueError, match=message):
            generate(model, ids, cache, attention_mask=mask, prefill_chunk_size=chunk)
    cache.reset()
    assert torch.equal(generate(model, ids, cache), generate(model, ids, LRSACache(CONFIG)))


def test_the_prompt_given_again_is_refused(model, used):
    cache, history = used
    for ids in (history[:, :70], history[:, :79]):
        with pytest.raises(ValueError, match="for another prompt use a new LRSACache"):
            generate(model, ids, cache)
        with pytest.raises(ValueError, match="for another prompt use a new LRSACache"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="the 0 tokens given"):
        model.generate(**{CACHE_ARGUMENT: cache}, bos_token_id=0)


def test_rows_that_beam_search_has_reordered(model):
    cache = LRSACache(CONFIG)
    found = generate(model, torch.randint(1, 48, (1, 50)), cache, num_beams=3, num_return_sequences=3)
    with pytest.raises(ValueError, match="beam search has reordered the rows"):
        generate(model, torch.cat([found, found], 1), cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 runs the model a second time"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha=0.5 looks ahead"),
        ({"use_cache": False}, "use_cache=False feeds all tokens again"),
    ],
)
def test_options_that_cannot_work(model, options, message):
    ids = torch.randint(1, 48, (1, 30))
    with pytest.raises(ValueError, match=message):
        generate(model, ids, LRSACache(CONFIG), **options)
    for name, value in options.items():  # as a model's own generation_config.json has it
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, LRSACache(CONFIG))
    remove_lrsa(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [79, 80, 0, 1], [80, 81, 82, 83], [79, 80, 82, 83]], ids=str)
def test_positions_go_on(model, used, positions):
    """Restarted positions would rotate the new keys as if nothing were before them; packed ones are two documents."""
    cache, history = used
    ids = torch.randint(1, 48, (1, 4))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"position_ids jump: row 0 of this LRSACache goes on at \d+, got"):
            model(ids, position_ids=torch.tensor([positions]), **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == 79
        cache = LRSACache(CONFIG)
        model(history, **{CACHE_ARGUMENT: cache})
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="row 1 of this LRSACache goes on at 80, got 5"):
            model(ids[:, :1].repeat(2, 1), position_ids=torch.tensor([[80], [5]]), **{CACHE_ARGUMENT: cache})


def test_a_forward_that_was_broken_off(model):
    ids = torch.randint(1, 48, (1, 40))
    with torch.no_grad():
        expected = model(ids).logits
    for layer, message in ((0, "layer 1 .* has seen 0 tokens"), (1, "layer 2 .* has seen 0 tokens")):
        cache = LRSACache(CONFIG)
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, **{CACHE_ARGUMENT: cache})
        hook.remove()
        with torch.no_grad(), pytest.raises(ValueError, match=message + ".*broken off"):
            model(ids, **{CACHE_ARGUMENT: cache})
        cache.reset()
        with torch.no_grad():
            close(model(ids, **{CACHE_ARGUMENT: cache}).logits, expected)
    cache = LRSACache(CONFIG)
    with pytest.raises(ValueError, match="2D padding mask"):
        model(ids, attention_mask=torch.ones(1, 3, 4, 5), **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="broken off in layer 0: start with a new LRSACache"):
        model(ids, **{CACHE_ARGUMENT: cache})
