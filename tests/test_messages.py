"""No message of the product names a Python exception: what is at fault is a setting, a file or a record."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("lrsa", "data", "train", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
NAME = re.compile(r"\b[A-Z]\w+(Error|Exception|Warning)\b")


def names(path: Path) -> list[str]:
    """Where a text that is put together shows the class of an exception, or its repr, which begins with it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        for part in node.values:
            if isinstance(part, ast.Constant) and NAME.search(part.value):
                found.append(f"{path}:{node.lineno}: {part.value}")
            elif isinstance(part, ast.FormattedValue):
                shown = ast.unparse(part.value)
                is_repr = part.conversion == ord("r") and shown in ("error", "exc", "e")
                if is_repr or (re.search(r"type\(\w+\)\.__name__|repr\((error|exc|e)\)", shown) and "error" in shown):
                    found.append(f"{path}:{node.lineno}: {shown}")
    return found


def test_no_message_names_an_exception():
    assert len(FILES) > 100
    assert [place for path in FILES for place in names(path)] == []


@pytest.mark.parametrize(
    "text", ['f"{error!r}"', 'f"{type(error).__name__}: {error}"', 'f"got a ValueError in {path}"']
)
def test_such_messages_are_noticed(text, tmp_path):
    (tmp_path / "module.py").write_text(f"message = {text}\n")
    assert len(names(tmp_path / "module.py")) == 1
