"""One problem that all contestants solve: terms, their weights, maybe a model, and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import jaxreg as jr

PyTree = Any
Batch = Mapping[str, Any]
Term = Callable[[jax.Array, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Value and gradient of ``Σ weightᵢ·termᵢ``, and the norm of every term's gradient.

    Attributes:
      terms: by name, the base loss (whose weight is 1) first.
      weights: one a term.
      x: what is differentiated: an array, or a flat dict of parameters.
      batch: a flat dict of arrays.
      forward: the model, ``forward(x, batch) -> outputs`` that the terms read, or None.
    """

    title: str
    terms: Mapping[str, Term]
    weights: tuple[float, ...]
    x: PyTree
    batch: dict[str, Any]
    forward: Callable[[PyTree, Batch], jax.Array] | None = None

    def outputs(self, x: PyTree, batch: Batch) -> jax.Array:
        """What the terms read."""
        return x if self.forward is None else self.forward(x, batch)

    def values(self, x: PyTree, batch: Batch) -> list[jax.Array]:
        """Every term's value."""
        outputs = self.outputs(x, batch)
        return [term(outputs, batch) for term in self.terms.values()]

    def weighted_sum(self, parts: list[Any]) -> Any:
        """``Σ weightᵢ·partᵢ`` of scalars, arrays or pytrees."""
        return jax.tree.map(
            lambda *leaves: sum(
                (w * leaf for w, leaf in zip(self.weights[1:], leaves[1:], strict=True)),
                start=leaves[0],
            ),
            *parts,
        )

    def objective(self, track_grad_norms: bool | jr.GradNorms, **options: Any) -> jr.CompositeLoss:
        """The problem as jaxreg has it; ``options`` are more of `jaxreg.compose`'s."""
        (_, base), *others = self.terms.items()
        specs = [
            jr.RegularizerSpec(name=name, fn=fn, weight=weight)
            for (name, fn), weight in zip(others, self.weights[1:], strict=True)
        ]
        return jr.compose(base, specs, forward=self.forward, track_grad_norms=track_grad_norms, **options)


def leaves_by_name(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
    """An array as ``{prefix: array}``, a flat dict as ``{prefix/name: array}``."""
    if isinstance(tree, Mapping):
        return {f"{prefix}/{name}": np.asarray(leaf) for name, leaf in tree.items()}
    return {prefix: np.asarray(tree)}


def to_flat(problem: Problem) -> dict[str, np.ndarray]:
    """x, batch and weights as one flat dict, for another process."""
    weights = {"weights": np.asarray(problem.weights)}
    return leaves_by_name("x", problem.x) | leaves_by_name("batch", problem.batch) | weights
