"""A family of every mechanism through the checks of the sweep; `make models` judges all of them."""

import pytest
import torch

from lrsa import apply_lrsa
from tests.lrsa.models import checks
from tests.lrsa.models.build import build
from tests.lrsa.models.oracle import oracle
from tests.lrsa.models.sweep import cases, judge

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
