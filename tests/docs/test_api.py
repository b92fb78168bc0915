"""docs/api.md is what docs/api.py makes of the docstrings, and has every public name."""

import re

import lrsa.evaluation
from docs import api


def test_the_page_is_current():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "docs/api.md is out of date: run python docs/api.py"


def test_it_has_every_public_name():
    headings = re.findall(r"^### (\w+)$", api.page(), re.MULTILINE)
    assert sorted(headings) == sorted(lrsa.__all__ + lrsa.evaluation.__all__)


def test_a_function_has_its_signature_and_its_whole_docstring():
    text = api.entry("select_tokens", lrsa.select_tokens)
    assert "select_tokens(keys: torch.Tensor, values: torch.Tensor, config: LRSAConfig) -> Selection" in text
    assert "Returns:" in text and "Source: LagKV" in text


def test_members_are_those_a_class_adds():
    added = api.members(lrsa.LRSAConfig)
    assert "keep_ratio" in added and "pop" not in added and "_problems" not in added
