"""Names for the leaves of a pytree, and filters on them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from jaxreg.spec import PyTree

PathFilter: TypeAlias = str | tuple[str, ...] | Callable[[str], bool]


def leaf_paths(tree: PyTree) -> list[str]:
    """One path a leaf, such as ``blocks/0/attention/kernel``."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def select_leaves(tree: PyTree, where: PathFilter | None, who: str) -> list[bool]:
    """For every leaf, whether ``where`` touches it.

    A string is a shell pattern on the whole path (``*/kernel``) or a leading part of it (``head``
    touches ``head/kernel``); a tuple of them touches what any of them does; a function gets the path.

    Raises:
      ValueError: nothing matches; it lists the paths there are.
    """
    paths = leaf_paths(tree)
    if where is None:
        return [True] * len(paths)
    chosen = [where(p) if callable(where) else _matches(p, where) for p in paths]
    if not any(chosen):
        raise ValueError(f"{who}: {where!r} matches none of the paths:\n  " + "\n  ".join(paths))
    return [bool(c) for c in chosen]


def _matches(path: str, patterns: str | Sequence[str]) -> bool:
    names = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, n) or path.startswith(n.rstrip("/") + "/") for n in names)
