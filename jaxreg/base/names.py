"""What else a name that is not known may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """A hint to put before a list of the names that there are; empty where none is near.

    Example:
      >>> did_you_mean("l1_sparsty", ["entropy", "l1_sparsity"])
      "did you mean 'l1_sparsity'? "
      >>> did_you_mean("KL", ["kl"]), did_you_mean("l1", ["l1_sparsity"]), did_you_mean("q", ["kl"])
      ("did you mean 'kl'? ", "did you mean 'l1_sparsity'? ", '')
    """
    asked, known = str(name).lower(), {other.lower(): other for other in names}
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.4)
    near = near or [other for other in known if asked and asked in other]
    return f"did you mean {known[near[0]]!r}? " if near else ""
