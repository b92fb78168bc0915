"""The gallery of kept tokens: what it computes is what the cache holds, and the command writes what it promises."""

import argparse
import json
import re

import pytest
import torch
import transformers
from transformers import DynamicCache

from launch.kept_tokens import show
from lrsa import LRSACache, LRSAConfig, apply_lrsa, select_tokens
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation.measure.cost import kept_share, prefill_cost
from lrsa.evaluation.report.kept_tokens import (
    draw_kept_tokens,
    holding_layers,
    kept_tokens,
    near,
    read_passage,
    write_page,
)
from tests.lrsa.models.build import SHARED, SLIDES, build
from tests.tiny_run import ROOT, launch_here

CONFIG = LRSAConfig(3, 8, 2, skip_layers=(1,))


@pytest.fixture
def row():
    return torch.randint(1, 48, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def test_kept_tokens_are_those_the_cache_holds(random_llama, row):
    """The keys and values at the kept positions are, bit for bit in their order, what an `LRSACache` holds."""
    model, ids = apply_lrsa(random_llama, CONFIG), torch.tensor([row])
    kept = kept_tokens(model, row)
    cache, full = LRSACache(CONFIG), DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
        model(ids, **{CACHE_ARGUMENT: full})
    for layer, marks, whole in zip(cache.layers, kept, full.layers, strict=True):
        for head, mark in enumerate(marks):
            held = int(mark.sum())
            assert held == layer.held()[0]
            assert torch.equal(whole.keys[0, head, mark], layer.keys[0, head, :held])
            assert torch.equal(whole.values[0, head, mark], layer.values[0, head, :held])
    assert kept[1].all() and not kept[0].all()
    assert not torch.equal(kept[0, 0], kept[0, 1]), "the heads choose alike: the test would not see them swapped"


def test_kept_tokens_are_those_selected(random_llama, row):
    model = apply_lrsa(random_llama, CONFIG)
    kept, full = kept_tokens(model, row), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([row]), **{CACHE_ARGUMENT: full})
    index = select_tokens(full.layers[2].keys, full.layers[2].values, CONFIG).index[0, 1].flatten().tolist()
    border = near(60, CONFIG)
    assert border == 3 + 6 * 8
    assert kept[2, 1].nonzero()[:, 0].tolist() == [0, 1, 2, *index, *range(border, 60)]


def test_layers_with_a_sliding_window_hold_their_last_tokens(row):
    config = transformers.Gemma3TextConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=12, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = apply_lrsa(transformers.AutoModelForCausalLM.from_config(config), CONFIG)
    kept, cache = kept_tokens(model, row), LRSACache(CONFIG)
    with torch.no_grad():
        model(torch.tensor([row]), **{CACHE_ARGUMENT: cache})
    assert kept[0].all(0).nonzero()[:, 0].tolist() == list(range(60 - 12, 60))
    assert kept.sum(-1).tolist() == [[held] * 2 for held in (layer.held()[0] for layer in cache.layers)]


SLIDING = {"layer_types": SLIDES, "sliding_window": 12, "attention_k_eq_v": True, "num_global_key_value_heads": 1}


@pytest.mark.parametrize(
    ("family", "options", "layers"),
    [("qwen3_5_text", {}, [1, 3]), ("gemma4_text", SHARED, [0, 1]), ("gemma4_text", SLIDING, [0, 1, 2, 3])],
    ids=["recurrent", "shared", "heads"],
)
def test_layers_that_hold_no_tokens_of_their_own(row, family, options, layers):
    model = apply_lrsa(build(family, **options), CONFIG)
    kept, costs = kept_tokens(model, row), prefill_cost(model, row)
    assert holding_layers(model) == layers == [cost.layer for cost in costs]
    assert kept.sum(-1).tolist() == [[cost.kept] * 2 for cost in costs]
    whole = sum(cost.kept for cost in costs if family != "gemma4_text") / (60 * len(costs))
    assert family == "gemma4_text" or kept_share(model, CONFIG, [60]) == pytest.approx(whole)


def test_dense_model_is_refused(random_llama, row):
    with pytest.raises(ValueError, match="apply_lrsa"):
        kept_tokens(random_llama, row)


TEXTS = {"byte_tokenizer": "The fox: 'é' costs 5 €.\nEnd", "blank_tokenizer": "The quick fox."}


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_text(name, request):
    """Every letter belongs to one token, also where a letter is several tokens."""
    tokenizer, text = request.getfixturevalue(name), TEXTS[name]
    passage = read_passage(tokenizer, text, 1000)
    assert passage.pieces[0] == "<s>" and "".join(passage.pieces[1:]) == text
    assert passage.ids[1:] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ("" in passage.pieces) == (name == "byte_tokenizer")
    assert len(read_passage(tokenizer, text, 3).ids) == len(read_passage(tokenizer, text, 3).pieces) == 3


def test_page_shades_by_heads(tmp_path):
    kept = torch.ones(2, 2, 40, dtype=torch.bool)
    kept[:, :, 3:19] = False
    kept[:1, :1, 5] = True
    config = LRSAConfig(3, 8, 2)
    pieces = ["<s>", *"ab", "<", *"c" * 36]
    write_page(kept, pieces, config, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    spans = re.findall(r'background:(#\w+)" title="token (\d+): kept by (\d) of 4">([^<]*)<', page)
    assert len(spans) == 40 and spans[0][3] == "&lt;s&gt;" and spans[3][3] == "&lt;"
    assert [int(count) for _, _, count, _ in spans] == kept.sum((0, 1)).tolist()
    grey, none, one = spans[0][0], spans[4][0], spans[5][0]
    assert none == "#ffffff" and len({grey, none, one}) == 3 and spans[-1][0] == grey
    draw_kept_tokens(kept, pieces, config, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_command(tmp_path):
    """The embedded base with settings of the command line, on the second record, from the named words on."""
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text(
        json.dumps({"text": "no"}) + "\n" + json.dumps({"text": "the code " + "house river amber 4 . " * 30})
    )
    options = f"--model data/tiny_base --text {text} --out {out} --sink-size 2 --lag-size 8 --top-k 2 --tokens 90"
    found = launch_here(ROOT, "launch/kept_tokens.py", *options.split(), "--start", "house")
    assert found.returncode == 0, found.stderr
    assert "90 tokens, sink 2, lag 8, top_k 2" in found.stdout
    words = re.findall(r"of 6\">([^<]*)<", (out / "kept_tokens.html").read_text())
    assert words[0] == "&lt;bos&gt;" and "".join(words[1:]).startswith("house river amber")
    assert (out / "kept_tokens.png").stat().st_size > 1000


def test_words_that_are_not_there(tmp_path):
    (tmp_path / "text.txt").write_text("house")
    names = dict.fromkeys(("sink_size", "lag_size", "top_k"))
    options = argparse.Namespace(text=str(tmp_path / "text.txt"), start="nowhere", **names)
    with pytest.raises(ValueError, match="--start nowhere: does not occur in"):
        show(options)
