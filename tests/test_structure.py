"""The shape of the source: what a stranger can hold in mind, and imports that point one way."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["lrsa", "data", "train", "launch"]  # each may import itself and those before it
FOLDERS = [*ORDER, "benchmarks", "docs", "tests"]
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules of this repository that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names & MODULES.keys()


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    return [name for name in graph if name in reached(name)]


def test_a_folder_holds_at_most_14_files():
    count = Counter(path.parent.relative_to(ROOT) for path in FILES)
    assert len(count) > 20 and not {str(folder): n for folder, n in count.items() if n > 14}


def test_a_file_has_at_most_300_lines_and_a_function_60():
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 300:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long


def test_imports_have_no_circle():
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200 and not circles(graph)
    first, second = "lrsa.config", "lrsa.scoring"
    assert second not in graph[first] and circles(graph | {first: graph[first] | {second}}), "a circle is seen"


@pytest.mark.parametrize("place", range(len(ORDER)))
def test_imports_point_one_way(place):
    own = {name: path for name, path in MODULES.items() if name.partition(".")[0] == ORDER[place]}
    allowed = set(ORDER[: place + 1])
    wrong = {
        name: sorted(n for n in imported(path) if n.partition(".")[0] not in allowed) for name, path in own.items()
    }
    assert own and not {name: names for name, names in wrong.items() if names}
