"""YAML as configurations use it: the scalars of version 1.2, the line of every value, and texts that read back."""

from __future__ import annotations

from train.settings.sources import parse, to_yaml


def test_yaml_scalars_are_those_of_version_1_2():
    text = "a: 1e-4\nb: no\nc: 0x1f\nd: 010\ne: .5\nf: true\ng: ~\nh: 12:30\ni: -3\nj: 2020-01-01\nk:\n"
    values = {"a": 1e-4, "b": "no", "c": 31, "d": 10, "e": 0.5, "f": True, "g": None, "h": "12:30", "i": -3,
              "j": "2020-01-01", "k": None}  # fmt: skip
    assert parse(text).values == values


def test_every_value_has_its_line():
    lines = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\ne: 3\n").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "d"): 5,
                     ("e",): 6}  # fmt: skip


def test_every_key_that_is_written_twice_is_told():
    assert parse("a: 1\na: 2\nb:\n  c: 1\n  c: 1\n").twice == [
        (2, ("a",), "written twice, first on line 1; keep one"),
        (5, ("b", "c"), "written twice, first on line 4; keep one"),
    ]


def test_what_is_written_reads_back():
    values = {"b": {"no": "no", "number": 1e-5, "text": "1e-4", "date": "2020-01-01", "lines": "a\n\n  b: ü\t{c}\n",
                    "none": None, "empty": "", "list": [1, {"x": []}], "long": "word " * 60}, "a": {}}  # fmt: skip
    assert parse(to_yaml(values)).values == values
    assert list(parse(to_yaml(values)).values) == ["b", "a"], "in the order of the sections"


def test_configurations_that_earlier_versions_stored_are_read():
    """PyYAML wrote them: floats with a dot, texts that YAML 1.1 takes for something else in quotes."""
    old = "train:\n  learning_rate: 1.0e-05\n  save_strategy: 'no'\n  seed: 0\nlrsa:\n  skip_layers: []\n"
    train = {"learning_rate": 1e-5, "save_strategy": "no", "seed": 0}
    assert parse(old).values == {"train": train, "lrsa": {"skip_layers": []}}
