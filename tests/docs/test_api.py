"""docs/api.md is what docs/api.py makes of the docstrings, and has every public name."""

import re

import lrsa.evaluation
from docs import api


def test_the_page_is_current():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "docs/api.md is out of date: run python docs/api.py"


def test_it_has_every_public_name():
    headings = re.findall(r"^### (\w+)$", api.page(), re.MULTILINE)
    assert sorted(headings) == sorted(lrsa.__all__ + lrsa.evaluation.__all__)


def example(number: int, *rest, unit: str = "token", **options) -> str:
    """Do it.

        example(1)

    Args:
        number: how many,
            and more: of it.
        rest, unit: the others.

    Returns:
        What was done,
        in one line.

    Source: nowhere.
    """


def test_signatures_and_sections():
    line = "example(number: int, *rest, unit: str = 'token', **options) -> str"
    assert api.signature("example", example) == line
    wide = api.signature("example", example, width=20).splitlines()
    assert wide[1] == "    number: int," and wide[-1] == ") -> str" and len(wide) == 6
    assert api.prose(example.__doc__) == (
        "Do it.\n\n    example(1)\n\n**Args**\n\n- `number`: how many,\n  and more: of it.\n"
        "- `rest, unit`: the others.\n\n**Returns**\n\nWhat was done,\nin one line.\n\nSource: nowhere."
    )


def test_members_are_those_a_class_adds():
    added = api.members(lrsa.LRSAConfig)
    assert "keep_ratio" in added and "pop" not in added and "_problems" not in added
