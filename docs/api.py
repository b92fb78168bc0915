"""The reference of the public names: their signatures and docstrings as Markdown.

python docs/api.py           # writes docs/api.md
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

PAGE = Path(__file__).with_name("api.md")
MODULES = ("lrsa", "lrsa.evaluation")
FIRST = ("load", "LRSAConfig", "apply_lrsa", "remove_lrsa", "LRSACache", "lrsa_attention", "compare", "Results")
HEAD = """# Public names

Made from the docstrings by `python docs/api.py`. Letters of shapes: B batch, H query heads, G KV heads, T query tokens,
S tokens of a row, W complete windows, L = `lag_size`, K = `top_k`, D head dim.
"""
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r"    (\w[\w, ]*): (.*)$")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        first = [name for name in FIRST if name in module.__all__]
        names = first + [name for name in module.__all__ if name not in first]
        parts.append(f"## {module_name}\n\n{inspect.cleandoc(module.__doc__)}\n")
        parts += [entry(name, getattr(module, name)) for name in names]
    return "\n".join(parts)


def entry(name: str, item) -> str:
    """A public name: heading, signature, docstring, and for a class its own public members."""
    text = f"### {name}\n\n```python\n{signature(name, item)}\n```\n\n{prose(item.__doc__)}\n"
    rows = [describe(member, value) for member, value in members(item).items()]
    return text + "".join(f"\n{row}" for row in rows if row) + ("\n" if any(rows) else "")


def members(item) -> dict:
    """The public attributes that a class adds to its bases; none of a function."""
    if not inspect.isclass(item):
        return {}
    inherited = {name for base in item.__mro__[1:] for name in vars(base)}
    return {name: value for name, value in vars(item).items() if name not in inherited and not name.startswith("_")}


def describe(name: str, value) -> str:
    """One line on a member of a class, empty for plain data and what has no docstring."""
    if isinstance(value, property):
        return f"- `.{name}`: {first_paragraph(value.fget)}" if value.fget.__doc__ else ""
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if not inspect.isfunction(function) or not function.__doc__:
        return ""
    return f"- `.{signature(name, getattr(value, '__func__', value), width=None)}`: {first_paragraph(function)}"


def first_paragraph(function) -> str:
    return " ".join(inspect.cleandoc(function.__doc__).split("\n\n")[0].split())


def signature(name: str, item, width: int | None = 100) -> str:
    """`name(parameter: annotation = default, ...) -> annotation`, on several lines where it is wider than `width`."""
    parts, keyword_only = [], False
    found = inspect.signature(item)
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind == parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        typed = f": {annotation(parameter.annotation)}" if parameter.annotation is not parameter.empty else ""
        default = f" = {parameter.default!r}" if parameter.default is not parameter.empty else ""
        parts.append(f"{stars}{parameter.name}{typed}{default if typed else default.replace(' ', '')}")
    is_class = inspect.isclass(item)
    returns = "" if is_class or found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){returns}"
    if width is None or len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def annotation(value) -> str:
    """An annotation as it is written in the source."""
    return (
        value if isinstance(value, str) else getattr(value, "__forward_arg__", None) or inspect.formatannotation(value)
    )


def prose(docstring: str) -> str:
    """A docstring as Markdown: `Args:` and its like become bold words over a list or a paragraph."""
    result, section, indent = [], False, ""
    for line in inspect.cleandoc(docstring).split("\n"):
        if found := SECTION.match(line):
            section, indent = True, ""
            result += [f"**{found[1]}**", ""]
        elif section and (item := ENTRY.match(line)):
            indent = "  "
            result.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith(" "):
            result.append(indent + line.strip())
        else:
            section = section and not line
            result.append(line)
    return "\n".join(result)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
