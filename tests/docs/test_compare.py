"""Every line of docs/compare.md that says what is here names a test, and the test is there."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/compare.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_what_is_here_is_held_by_a_test():
    names = dict(re.findall(r"^\[(\d+)\]: (.*)$", TEXT, re.MULTILINE))
    for line in re.findall(r"^\| (?!---).*$", TEXT, re.MULTILINE)[1:]:
        ours = line.split("|")[2].strip()
        if not ours.startswith("no"):
            assert re.search(r"\[\d+\]", line), line
    assert {number for number in re.findall(r"\[(\d+)\](?!:)", TEXT)} == set(names)
    for reference in names.values():
        path, _, tests = reference.partition(" ")
        source = (PAGE.parent / path).read_text(encoding="utf-8")
        for test in re.findall(r"\w+", tests):
            assert f"def {test}(" in source, test
