"""Optional dependencies, which name themselves when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(module: str, extra: str, who: str) -> ModuleType:
    """Import a module of an extra.

    Example:
      >>> need("no_such_module", "plot", "report")
      Traceback (most recent call last):
      ImportError: report needs no_such_module: pip install "jaxreg[plot]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != missing:
            raise  # the module is there, and something in it is broken
        raise ImportError(f'{who} needs {missing}: pip install "jaxreg[{extra}]"') from error
