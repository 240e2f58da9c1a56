"""A batch taken apart by rows, into parts of one shape that know the whole's totals."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import PyTree

T = TypeVar("T")


def rows_a_part(rows: int, n: int, together: int, who: str) -> int:
    """How many rows each of n parts has, the last ones filled up: a multiple of what belongs together.

    Raises:
      TypeError, ValueError: n is no whole number ≥ 1, or rows that belong together are not all there.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"{who}: the number of parts is a whole number, got {n!r}")
    if n < 1:
        raise ValueError(f"{who}: the number of parts is at least 1, got {n}")
    if rows % together:
        raise ValueError(
            f"{who}: rows belong together in groups of {together} (pairs alternate, chosen and rejected), "
            f"but there are {rows} rows"
        )
    each = -(-rows // int(n))
    return -(-each // together) * together


def cut(tree: PyTree, rows: int, n: int, each: int, who: str) -> PyTree:
    """Every array [B, ...] as [n, B', ...], the last rows filled up with zeros."""

    def part(leaf: Any) -> Any:
        xp: Any = np if isinstance(leaf, np.ndarray) else jnp
        if xp.ndim(leaf) == 0 or leaf.shape[0] != rows:
            raise ValueError(
                f"{who}: every array of the batch has its rows on the first axis, {rows} of them; one has "
                f"shape {xp.shape(leaf)}"
            )
        missing = n * each - rows
        if missing:
            leaf = xp.concatenate([leaf, xp.zeros((missing, *leaf.shape[1:]), leaf.dtype)])
        return leaf.reshape(n, each, *leaf.shape[1:])

    return jax.tree.map(part, tree)


def repeated(totals: T, n: int) -> T:
    """The totals for each of n stacked parts."""

    def repeat(leaf: Any) -> Any:
        xp: Any = np if isinstance(leaf, np.ndarray | np.generic) else jnp
        return xp.broadcast_to(leaf, (n, *xp.shape(leaf)))

    return jax.tree.map(repeat, totals)  # type: ignore[no-any-return]


def unstacked(tree: PyTree, n: int) -> list[PyTree]:
    """The n parts of stacked ones."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(n)]
