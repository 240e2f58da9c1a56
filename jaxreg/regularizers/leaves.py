"""Which leaves of the parameters a term touches, and as what: entries, matrices, or stacks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.numbers import widened
from jaxreg.base.paths import PathFilter, leaf_paths, select_leaves
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch

# How many leading axes are layers: of every leaf, or by path (as pairs, once a term is made).
Layers: TypeAlias = int | Mapping[PathFilter, int] | tuple[tuple[PathFilter, int], ...]


def as_layers(layers: Layers | None, who: str) -> Layers | None:
    """The argument ``layers`` of a term, hashable.

    Raises:
      ValueError: it is no whole number ≥ 0, and no mapping from paths to such numbers.
    """
    pairs = tuple(layers.items()) if isinstance(layers, Mapping) else layers
    numbers = [number for _, number in pairs] if isinstance(pairs, tuple) else [pairs]
    if layers is not None and not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(
            f"{who}: layers says how many leading axes are layers: a whole number ≥ 0, or a mapping from "
            f"paths to such numbers, as in layers={{'blocks': 1}}; got {layers!r}"
        )
    return pairs


def chosen(x: PyTree, batch: PyTree, where: PathFilter | None, who: str) -> list[Array]:
    """The leaves that the filter touches, in float32 (or float64, or complex)."""
    return [leaf for _, leaf in _named(x, batch, where, who)]


def matrices(
    x: PyTree, batch: PyTree, where: PathFilter | None, layers: Layers | None, who: str
) -> list[Array]:
    """The chosen leaves with two axes or more beside layers, as [layers, all others, last axis]."""
    stacks = [
        leaf.reshape(math.prod(leaf.shape[:n]), math.prod(leaf.shape[n:-1]), leaf.shape[-1])
        for leaf, n in _stacked(x, batch, where, layers, who)
        if leaf.ndim >= n + 2
    ]
    if not stacks:
        shapes = "\n  ".join(
            f"{path}: {jnp.shape(leaf)}" for path, leaf in zip(leaf_paths(x), jax.tree.leaves(x), strict=True)
        )
        beside = " beside its layers" if layers else ""
        raise ValueError(f"{who}: none of the chosen leaves has two axes or more{beside}:\n  {shapes}")
    return stacks


def vectors(
    x: PyTree, batch: PyTree, where: PathFilter | None, layers: Layers | None, who: str
) -> list[Array]:
    """The chosen leaves as [layers, all entries of one]."""
    found = _stacked(x, batch, where, layers, who)
    return [leaf.reshape(math.prod(leaf.shape[:n]), math.prod(leaf.shape[n:])) for leaf, n in found]


def total(parts: list[Array]) -> Array:
    """Their sum."""
    return sum(parts[1:], start=parts[0])


def _named(x: PyTree, batch: PyTree, where: PathFilter | None, who: str) -> list[tuple[str, Array]]:
    if isinstance(batch, TokenBatch) and isinstance(x, jax.Array | np.ndarray) and x.shape[:2] == batch.shape:
        raise ValueError(
            f"{who}: x has the shape of the batch's tokens, {x.shape}, so it is outputs and no parameters: "
            f"give compose the model, forward=apply_fn; outputs have terms of their own (L1, L2, ...)"
        )
    touched = select_leaves(x, where, f"{who}(params=...)")
    triples = zip(leaf_paths(x), jax.tree.leaves(x), touched, strict=True)
    leaves = [(path, widened(leaf)) for path, leaf, yes in triples if yes]
    if not leaves:
        raise ValueError(f"{who}: x has no array in it")
    return leaves


def _stacked(
    x: PyTree, batch: PyTree, where: PathFilter | None, layers: Layers | None, who: str
) -> list[tuple[Array, int]]:
    """The chosen leaves, each with its number of leading axes that are layers."""
    numbers = _numbers(x, layers, who)
    found = []
    for path, leaf in _named(x, batch, where, who):
        at, number = path or "*", numbers.get(path)
        if number is None and leaf.ndim > 2:
            raise ValueError(
                f"{who}: at {at!r} is an array {leaf.shape}; say what its leading axes are: "
                f"layers={{{at!r}: 1}} if the first one counts layers, each with a matrix of its own (as "
                f"scan and vmap stack them); layers={{{at!r}: 0}} if it is one matrix, the last axis against "
                f"all others (a kernel [h, w, in, out] of a convolution, [heads, in, out] of attention)"
            )
        if number is not None and number > leaf.ndim:
            raise ValueError(
                f"{who}: layers says that {at!r} has {number} axes of layers; it is {leaf.shape}"
            )
        found.append((leaf, number or 0))
    return found


def _numbers(x: PyTree, layers: Layers | None, who: str) -> dict[str, int]:
    """By path, for the leaves that ``layers`` says something about."""
    paths = leaf_paths(x)
    if layers is None or isinstance(layers, int):
        return {} if layers is None else dict.fromkeys(paths, layers)
    numbers: dict[str, int] = {}
    for pattern, number in layers.items() if isinstance(layers, Mapping) else layers:
        for path, yes in zip(paths, select_leaves(x, pattern, f"{who}(layers=...)"), strict=True):
            if yes:
                numbers.setdefault(path, number)
    return numbers
