"""Latent attention (MLA): one selection for all heads, made from the latents, which are all that the cache holds."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.models.youtu.modeling_youtu import YoutuAttention

from lrsa import LRSACache, apply_lrsa
from lrsa.cache import CACHE_ARGUMENT
from lrsa.evaluation.report.kept_tokens import kept_tokens
from tests.lrsa.models import checks
from tests.lrsa.models.build import LATENT, build
from tests.lrsa.models.checks import CONFIG, Subject, logits
from tests.lrsa.models.subject import LENGTH
from tests.lrsa.models.sweep import judge

LAYERS = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "options"), [("deepseek_v3", {}), ("glm4_moe_lite", {"qk_nope_head_dim": 4})], ids=["v3", "glm"]
)
def test_a_family_that_works(family, options):
    """Keys of 12 channels and values of 8; keys and values of one width, which once trained by another rule."""
    found = judge(family, "", LATENT | LAYERS | options)
    assert found.verdict == "works" and not found.why, found.why


def test_a_configuration_that_comes_with_the_model_of_another_family():
    checks.one_forward(Subject(build("sarvam_mla", **LAYERS)))


@pytest.fixture(scope="module")
def subject():
    return Subject(build("youtu", **LAYERS))


def test_a_selection_by_other_states_is_noticed(subject, monkeypatch):
    monkeypatch.setattr("lrsa.latent.scored", lambda c_kv, k_rope: (c_kv, c_kv))
    with pytest.raises(AssertionError, match="differs"):
        checks.one_forward(subject)


def test_the_cache_holds_latents_of_the_kept_tokens(subject):
    model, cache, own = subject.applied(), LRSACache(CONFIG), DynamicCache()
    with torch.no_grad():
        model(subject.ids, **{CACHE_ARGUMENT: cache})
        subject.model(subject.ids, **{CACHE_ARGUMENT: own})
    kept = kept_tokens(model, subject.ids[0].tolist())
    assert kept.shape == (2, 1, LENGTH), "one selection for all heads"
    assert CONFIG.kept_length(LENGTH) < LENGTH
    for mine, theirs, held in zip(cache.layers, own.layers, kept[:, 0], strict=True):
        assert int(held.sum()) == CONFIG.kept_length(LENGTH)
        if theirs is own.layers[0]:  # further layers have other inputs
            assert torch.allclose(mine.keys, theirs.keys[:, :, held])
            assert torch.allclose(mine.values, theirs.values[:, :, held])
        assert not hasattr(mine, "_expand"), "a copy of the cache would copy the model"


def test_a_batch_of_padding(subject):
    model, cache = subject.applied(), LRSACache(CONFIG)
    mask = torch.zeros_like(subject.ids[:, :5])
    with torch.no_grad():
        for _ in range(2):  # into an empty cache, then another
            out = model(subject.ids[:, :5], attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
            mask = torch.zeros_like(torch.cat([mask, mask], 1))
    assert out.isfinite().all() and cache.layers[0].seen == [0]


def test_latents_that_were_expanded_are_refused(subject, monkeypatch):
    model = subject.applied()
    checks.one_forward(subject)
    monkeypatch.setattr(YoutuAttention, "expand_kv", YoutuAttention.expand_kv.before_lrsa)
    monkeypatch.setattr("lrsa.hf.mask.hand_latents_on", lambda config: None)
    with pytest.raises(ValueError, match="latent states of YoutuAttention"):
        logits(model, subject.ids)


def test_other_models_of_the_class_are_as_they_were(subject):
    other = copy.deepcopy(subject.model)
    with torch.no_grad():
        before = logits(other, subject.ids)
        sparse = logits(apply_lrsa(subject.model, CONFIG), subject.ids)
        assert torch.equal(logits(other, subject.ids), before) and not torch.equal(sparse, before)


def test_a_compiled_model(subject):
    compiled = torch.compile(subject.applied(), backend="eager")
    mask = torch.ones_like(subject.ids)  # with which the model asks for a mask
    with torch.no_grad():
        subject.close(logits(compiled, subject.ids, attention_mask=mask), subject.expected)
