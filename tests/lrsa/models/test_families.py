"""A family of every mechanism through the checks of the sweep; `make models` judges all of them."""

from unittest.mock import Mock

import pytest
import torch

from lrsa import apply_lrsa
from tests.lrsa.models import checks
from tests.lrsa.models.build import build
from tests.lrsa.models.families import cases
from tests.lrsa.models.oracle import oracle
from tests.lrsa.models.sweep import judge

WORKS = [
    ("llama", ""),
    ("qwen3_moe", ""),
    ("gemma3_text", ""),
    ("olmo3", "sliding"),
    ("phi3", ""),
    ("granite", ""),
    ("gpt_neox", ""),
    ("gemma4_text", "shared layers"),
    ("qwen3_5_text", ""),
    ("lfm2", ""),
    ("granitemoehybrid", ""),
    ("llava", "an image"),
    ("qwen2_5_vl", "an image"),
    ("gpt_oss", "sliding"),
    ("gemma2", "soft cap"),
    ("llama4_text", ""),
]
OPTIONS = {(family, variant): options for family, variant, options in cases()}


@pytest.mark.parametrize("case", WORKS, ids=" ".join)
def test_a_family_that_works(case):
    found = judge(*case, OPTIONS[case])
    assert found.verdict == "works", found.why


def test_the_oracle_notices_another_rule():
    """The oracle differs from a model that keeps one token more, and from the model itself."""
    model = build("llama")
    subject = checks.Subject(model)
    found = checks.logits(apply_lrsa(model, checks.CONFIG.replace(top_k=3)), subject.ids)
    for other in (found, subject.own):
        with pytest.raises(AssertionError, match="differs"):
            subject.close(other, subject.expected)


def test_the_oracle_is_the_model_itself_when_everything_is_kept():
    model = build("llama")
    ids = checks.Subject(model).ids
    with torch.no_grad(), oracle(model, None):
        own = checks.logits(model, ids)
    with torch.no_grad(), oracle(model, checks.CONFIG.replace(top_k=checks.CONFIG.lag_size)) as kinds:
        assert torch.equal(checks.logits(model, ids), own)
    assert kinds == ["compressed"] * 4


@pytest.mark.parametrize("dense", ["the same", "another"])
def test_an_error_is_excused_by_the_same_error_without_lrsa(dense, monkeypatch):
    def fails(subject, model, *args):
        raise ValueError("the same" if args else dense)  # under LRSA it is given a cache

    monkeypatch.setattr(checks, "_greedy", fails)
    subject = checks.Subject(build("llama"))
    if dense == "the same":
        assert checks.generate(subject) == "generates in a way of its own"
    else:
        with pytest.raises(ValueError, match="the same"):
            checks.generate(subject)


LOST = (AssertionError("checkpointing loses a"), AssertionError("checkpointing loses b"))


@pytest.mark.parametrize("results", [(0.5, 0.01), LOST], ids=["larger", "lost"])
def test_gradients_that_are_lost_are_not_excused(results, monkeypatch):
    monkeypatch.setattr(checks, "_checkpointed", Mock(side_effect=results))
    with pytest.raises(AssertionError, match=r"checkpointing (changes gradients|loses a)"):
        checks.adapter(checks.Subject(build("llama")))


@pytest.mark.parametrize("side", ["LRSA", "the oracle"])
def test_a_parameter_with_a_gradient_on_one_side_alone_fails(side):
    subject = checks.Subject(build("llama"))
    lost = "model.layers.0.self_attn.k_proj.weight"
    if side == "LRSA":
        applied = subject.applied()
        applied.get_parameter(lost).requires_grad_(False)
        subject.applied = lambda: applied
    else:
        whole = subject.applied()
        subject.model.get_parameter(lost).requires_grad_(False)
        subject.applied = lambda: whole
    with pytest.raises(AssertionError, match=rf"gradients for .*{lost}"):
        checks.gradients(subject)
