"""Every link of every Markdown file leads to a file or a heading that is there, and the log's index is complete."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "configs", "data", "docs", "launch", "lrsa", "tests", "train")
PAGES = sorted(ROOT.glob("*.md")) + sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
# [text](target), ![text](target), [name]: target, <img src="target">
LINK = re.compile(r'\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|(?:src|href)="([^"]+)"', re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of all links outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return ["".join(match) for match in LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere inside the repository."""
    wrong = []
    for target in links(text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.exists() and file.is_relative_to(ROOT)
        if not inside or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_broken_links_are_found():
    text = "[a](no.md) ![b](docs/no.png) [c](#no-heading) [d](README.md#no-heading) `[e](code.md)`\n[1]: x.md"
    wrong = ["no.md", "docs/no.png", "#no-heading", "README.md#no-heading", "x.md"]
    assert broken(ROOT / "README.md", text) == wrong


def test_the_log_lists_its_entries_newest_first():
    log = ROOT / "docs" / "log"
    index = (log / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[.*?\]\((.*?)\)", index, re.MULTILINE)
    assert sorted(name for _, name in listed) == sorted(entry.name for entry in log.glob("2*.md"))
    assert all(name.startswith(date) for date, name in listed)
    assert [date for date, _ in listed] == sorted((date for date, _ in listed), reverse=True)
