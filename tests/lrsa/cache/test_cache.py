"""The cache against one forward: any chunks, any padding, bytes, wrong use. Generation: test_generate.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import lrsa
from lrsa import LRSACache, LRSAConfig, apply_lrsa, remove_lrsa
from lrsa.cache import CACHE_ARGUMENT, compressed, rows
from lrsa.cache.sliding import SlidingLayer
from lrsa.selection import select_tokens
from tests.lrsa.cache.feeding import close, over_cache, padded

CONFIG = LRSAConfig(3, 8, 2)
CHUNKS = [
    [CONFIG.dense_length] + [CONFIG.lag_size] * 20,  # as DESIGN defines prefill
    [1] * 100,  # token by token
    [100],  # one shot
    [5, 30, 1, 1, 7, 33, 1, 22],
    [13] * 8,
]


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
    select = compressed.select_tokens
    monkeypatch.setattr(compressed, "select_tokens", lambda *args: lrsa.Selection(select(*args).index.roll(1, dims=1)))
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
    ids, mask = padded([row[0] for row in rows], side)
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
        close(model(padded, **{CACHE_ARGUMENT: LRSACache(CONFIG)}, **options).logits[:, 9:], expected)
        monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "lrsa")
        with pytest.raises(AssertionError):
            close(model(padded, **{CACHE_ARGUMENT: LRSACache(CONFIG)}, **options).logits[:, 9:], expected)


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


@pytest.mark.parametrize("chunks", [[70], [30, 40], [8] * 9, [25, 1, 9, 20, 1, 14]], ids=str)
def test_dense_prefill_sees_all_that_is_held(chunks):
    """`prefill="dense"` against the plain rule: every chunk sees what earlier chunks left, and itself causally."""
    states = torch.randn(3, 2, 2, 70, 8, dtype=torch.float64)
    query, key, value = states
    layer = compressed.CompressedLayer(CONFIG, "dense")
    start = 0
    for size in chunks:
        stop = min(start + size, 70)
        found = layer.attend(*(x[:, :, start:stop] for x in states))
        seen = torch.zeros(2, 2, 1, stop, dtype=torch.bool)
        cut = CONFIG.sink_size + CONFIG.compressed_windows(start) * CONFIG.lag_size
        kept = select_tokens(key[:, :, :start], value[:, :, :start], CONFIG).index.flatten(2)
        seen.scatter_(3, kept[:, :, None], True)
        position = torch.arange(stop)
        seen |= (position < CONFIG.sink_size) | (position >= cut)
        seen = seen & (position <= torch.arange(start, stop)[:, None])
        close(
            found, F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], seen)
        )
        start = stop
    assert layer.held() == [CONFIG.kept_length(70)] * 2


PER_TOKEN = 2 * 8 * 8  # bytes of a token in a layer's keys: two KV heads of eight fp64 channels


def test_memory_of_dropped_tokens_is_released(random_llama):
    """Bytes of the storage, not of a view, after one shot, after chunks and while decoding."""
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (1, 400))
    for chunks in ([400], [100, 300], [391, 9]):
        _, cache = over_cache(model, ids, chunks, CONFIG)
        for states in (x for layer in cache.layers for x in (layer.keys, layer.values)):
            assert states.untyped_storage().nbytes() == CONFIG.kept_length(400) * PER_TOKEN
    _, cache = over_cache(model, ids, [1] * 400, CONFIG)
    assert cache.layers[0].keys.untyped_storage().nbytes() <= (CONFIG.kept_length(400) + 80) * PER_TOKEN


@pytest.mark.parametrize("layer", [compressed.CompressedLayer(CONFIG), SlidingLayer(50)])
@pytest.mark.parametrize("tokens", [10, 100])
def test_no_view_of_what_the_model_computed(layer, tokens):
    """Phi-3 computes query, key and value as one tensor, which a view would keep alive."""
    layer.reset()
    fused = torch.randn(1, 6, tokens, 8, dtype=torch.float64).chunk(3, dim=1)
    layer.attend(*fused)
    assert layer.keys.untyped_storage().nbytes() == layer.held()[0] * PER_TOKEN


def test_growth_is_amortised(random_llama, monkeypatch):
    """Decoding copies the buffer now and then, not for every token."""
    model = apply_lrsa(random_llama, CONFIG)
    copies = []
    pad = torch.nn.functional.pad
    monkeypatch.setattr("lrsa.cache.rows.F.pad", lambda *args: copies.append(1) or pad(*args))
    over_cache(model, torch.randint(0, 48, (1, 400)), [10] + [1] * 390, CONFIG)
    grown = CONFIG.kept_length(400) - 10
    assert 0 < len(copies) / (3 * 2) <= grown / 64 + 1  # keys and values of three layers


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


@pytest.mark.parametrize("layers", ["lrsa", "skipped", "sliding"])
def test_prefill_makes_nothing_of_size_t_by_t(random_llama, layers):
    """One shot and a second turn of 3000 tokens: the largest tensor is a linear layer's, or one of the window's."""
    model = apply_lrsa(random_llama, CONFIG.replace(skip_layers=(0, 1, 2) if layers == "skipped" else ()))
    if layers == "sliding":
        model.config.sliding_window = 100
    config = model.config.lrsa
    ids = torch.randint(0, 48, (1, 3000))
    cache = LRSACache(config)
    for _ in range(2):
        with Largest() as largest, torch.no_grad():
            model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        assert 64 * 3000 <= largest.elements < 3000 * 3000 / 2
    dense = remove_lrsa(model)
    with Largest() as largest, torch.no_grad():
        dense(ids, attention_mask=(ids >= 0).long().index_fill(1, torch.tensor([0]), 0), logits_to_keep=1)
    assert largest.elements >= 3000 * 3000  # what the measuring finds where a mask is made


class HostCopies(TorchDispatchMode):
    """Counts the tensors that are made of Python numbers."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten.lift_fresh.default
        return operation(*args, **kwargs or {})


def test_decoding_copies_positions_once_per_step(random_llama):
    """Of rows of different lengths: where to write, what is held, what is cut; the three layers share them."""
    model = apply_lrsa(random_llama, CONFIG)
    ids, mask = padded([torch.randint(0, 48, (length,)) for length in (40, 33, 20)])
    _, cache = over_cache(model, ids, [40], CONFIG, mask)
    rows._copied.cache_clear()
    with HostCopies() as copies, torch.no_grad():
        for step in range(16):
            model(ids[:, :1], position_ids=mask.sum(1, keepdim=True) + step, **{CACHE_ARGUMENT: cache})
    assert 16 < copies.count <= 16 * 3 + 6 * 2  # six windows were cut, for which two more are needed
    assert cache.layers[0].held() == [CONFIG.kept_length(length + 16) for length in (40, 33, 20)]


def test_decoding_with_gradients_behind_inference(random_llama):
    """What is shared between steps was not made in inference mode, whose tensors autograd refuses."""
    model = apply_lrsa(random_llama, CONFIG)
    ids, mask = padded([torch.randint(0, 48, (length,)) for length in (40, 33)])
    for mode in (torch.inference_mode(), torch.enable_grad()):
        _, cache = over_cache(model, ids, [40], CONFIG, mask)
        with mode:
            logits = model(ids[:, :1], position_ids=mask.sum(1, keepdim=True), **{CACHE_ARGUMENT: cache}).logits
    logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_ten_thousand_tokens_stay_flat(random_llama):
    """Decoding at lag 16: the bytes held per kept token do not grow."""
    config = LRSAConfig(4, 16, 4)
    model = apply_lrsa(random_llama, config)
    cache, ids = LRSACache(config), torch.randint(0, 48, (1, 1))
    per_token = {}
    for seen in range(1, 10_001):
        with torch.no_grad():
            ids = model(ids, **{CACHE_ARGUMENT: cache}).logits[:, -1].argmax(-1, keepdim=True)
        if seen in (1000, 3000, 10_000):
            layer = cache.layers[0]
            assert layer.held() == [config.kept_length(seen)]
            per_token[seen] = layer.keys.untyped_storage().nbytes() / config.kept_length(seen)
    assert config.kept_length(10_000) < 2600
    assert all(
        PER_TOKEN <= found <= PER_TOKEN * (1 + 1 / 32) + 64 * PER_TOKEN / config.kept_length(seen)
        for seen, found in per_token.items()
    )


def test_wrong_use_is_named(random_llama):
    model = apply_lrsa(random_llama, CONFIG)
    ids = torch.randint(0, 48, (2, 30))
    _, cache = over_cache(model, ids, [30], CONFIG)
    with pytest.raises(ValueError, match="holds a batch of 2, got 1 rows"), torch.no_grad():
        model(ids[:1, :1], **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(10)
    with pytest.raises(ValueError, match="cannot be offloaded"):
        cache.offload(0)
    with pytest.raises(ValueError, match="'sparse' or 'dense', got 'lagkv'"):
        LRSACache(CONFIG, prefill="lagkv")
    lrsa.remove_lrsa(model)
    with pytest.raises(ValueError, match="attention is not 'lrsa'"):
        over_cache(model, ids, [30], CONFIG)  # at the second layer of the first forward
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
        close(model(ids[:1], **{CACHE_ARGUMENT: cache}).logits, first[:1])


def test_what_other_layers_attend_to_holds_one_earlier_state():
    """Each state that held the one before it would keep every buffer of a long generation alive."""
    layer = compressed.CompressedLayer(CONFIG)
    for tokens in (40, 1, 1):
        states = torch.randn(1, 2, tokens, 8)
        layer.attend(torch.randn(1, 4, tokens, 8), states, states, shared=True)
    assert layer._before is not None and layer._before._before is None
