"""The reference of the public names: their signatures and docstrings as Markdown.

python docs/api.py           # writes docs/api.md
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

PAGE = Path(__file__).with_name("api.md")
MODULES = ("lrsa", "lrsa.evaluation")
HEAD = """# Public names

Made from the docstrings by `python docs/api.py`. Letters of shapes: B batch, H query heads, G KV heads, T query tokens,
S tokens of a row, W complete windows, L = `lag_size`, K = `top_k`, D head dim.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for module in map(importlib.import_module, MODULES):
        parts.append(f"## {module.__name__}\n\n{inspect.cleandoc(module.__doc__)}\n")
        parts += [entry(name, getattr(module, name)) for name in module.__all__]
    return "\n".join(parts)


def entry(name: str, item) -> str:
    """A public name: signature and docstring, and for a class the public functions that it adds to its bases."""
    text = f"### {name}\n\n```python\n{name}{signature(item)}\n```\n\n```text\n{inspect.cleandoc(item.__doc__)}\n```\n"
    for member, value in members(item).items():
        call = signature(value) if callable(value) else ""
        text += f"\n- `.{member}{call}`: {' '.join(inspect.cleandoc(value.__doc__).split(chr(10) * 2)[0].split())}"
    return text + "\n"


def members(item) -> dict:
    """Public functions and properties that a class adds to its bases, those that say what they mean."""
    if not inspect.isclass(item):
        return {}
    inherited = {name for base in item.__mro__[1:] for name in vars(base)}
    own = {name: getattr(item, name) for name in vars(item) if name not in inherited and not name.startswith("_")}
    kinds = (property, functools.cached_property, types.FunctionType, types.MethodType)
    return {name: value for name, value in own.items() if isinstance(value, kinds) and value.__doc__}


class Source(str):
    """An annotation that shows as it is written in the source."""

    __repr__ = str.__str__


def signature(item) -> str:
    """Parameters, without `self`, and result."""
    full = inspect.signature(item)
    rest = [p.replace(annotation=Source(p.annotation)) if isinstance(p.annotation, str) else p
            for p in full.parameters.values() if p.name != "self"]  # fmt: skip
    result = Source(full.return_annotation) if isinstance(full.return_annotation, str) else full.return_annotation
    return str(full.replace(parameters=rest, return_annotation=full.empty if inspect.isclass(item) else result))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
