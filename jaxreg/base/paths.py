"""Names for the leaves of a pytree, and filters on them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax

from jaxreg.base.types import PyTree

PathFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool]


def leaf_paths(tree: PyTree) -> list[str]:
    """One path a leaf, such as ``blocks/0/attention/kernel``.

    The ``value`` that Flax NNX puts inside each of its variables is left out.
    """
    paths = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        inside = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
        keys = path[:-1] if inside else path
        paths.append(jax.tree_util.keystr(keys, simple=True, separator="/"))
    return paths


def select_leaves(tree: PyTree, where: PathFilter | None, who: str) -> list[bool]:
    """For every leaf, whether ``where`` touches it.

    A string is a shell pattern on the whole path (``*/kernel``) or a leading part of it (``head``
    touches ``head/kernel``); a sequence of them touches what any of them does; a function gets the path.

    Raises:
      ValueError: nothing matches; it lists the paths there are.
    """
    paths = leaf_paths(tree)
    if where is None:
        return [True] * len(paths)
    chosen = [False] * len(paths)
    for pattern in (where,) if isinstance(where, str) or callable(where) else where:
        touched = [bool(pattern(p)) if callable(pattern) else _matches(p, pattern) for p in paths]
        if not any(touched):
            raise ValueError(f"{who}: {pattern!r} matches none of the paths:\n  " + "\n  ".join(paths))
        chosen = [a or b for a, b in zip(chosen, touched, strict=True)]
    return chosen


def _matches(path: str, pattern: str) -> bool:
    """Whether the pattern fits the path, or a leading part of it."""
    parts = path.split("/")
    heads = ("/".join(parts[: n + 1]) for n in range(len(parts)))
    return any(fnmatch.fnmatchcase(head, pattern.rstrip("/")) for head in heads)
