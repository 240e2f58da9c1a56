"""What else a name that is not known may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """A hint to put before a list of the names that there are; empty where none is near.

    Example:
      >>> did_you_mean("l1_sparsty", ["entropy", "l1_sparsity"])
      "did you mean 'l1_sparsity'? "
    """
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""
