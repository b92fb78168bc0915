"""The packages that reports need and `import lrsa` does not: the extra `lrsa[evaluation]`."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(module: str, group: str = "evaluation") -> ModuleType:
    """Import a module of matplotlib, rich, tqdm or, with `group="harness"`, lm_eval.

    Raises:
        ImportError: when it is not installed, with what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{package} is needed here: pip install "lrsa[{group}]" ({error})') from error
