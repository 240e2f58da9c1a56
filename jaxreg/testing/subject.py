"""The term under test and its example, and how what it answers is compared."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.paths import leaf_paths
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.core.spec import call_term


class Answer(NamedTuple):
    """All that a term gives at one place, on the host; the gradient one array a leaf of x."""

    value: float
    metrics: dict[str, float]
    gradient: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A term, an example of what it reads, and the randomness of the checks."""

    fn: TermFn
    x: PyTree
    batch: PyTree
    extra: dict[str, Any]
    rng: np.random.Generator
    rows_together: int

    def reported(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The value and the metrics."""
        return call_term(self.fn, x, batch, self.extra, "the term")[:2]

    def answer(self, x: PyTree, batch: PyTree) -> Answer:
        """The value, the metrics and the gradient."""
        (value, metrics), gradient = self._compiled(x, batch)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        return Answer(float(value), {name: float(metric) for name, metric in metrics.items()}, leaves)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(jax.value_and_grad(self.reported, has_aux=True))  # many answers are of one shape

    def paths(self) -> list[str]:
        """What the leaves of x are called."""
        return leaf_paths(self.x)

    def groups(self) -> np.ndarray:
        """The rows of the batch, those that belong together in one row."""
        return np.arange(len(self.batch.mask)).reshape(-1, self.rows_together)


def difference(got: Answer, want: Answer) -> str | None:
    """What differs first in value or metrics, in words."""
    if not close(got.value, want.value):
        return f"the value is {got.value}, not {want.value}"
    for name, metric in want.metrics.items():
        if not close(got.metrics[name], metric):
            return f"the metric {name!r} is {got.metrics[name]}, not {metric}"
    return None


def not_finite(answer: Answer, paths: list[str]) -> str | None:
    """What is not finite first, in words."""
    if not np.isfinite(answer.value):
        return f"the value is {answer.value}"
    for path, leaf in zip(paths, answer.gradient, strict=True):
        if not finite(leaf).all():
            return f"the gradient{of(path)} is not finite {where(~finite(leaf))}"
    for name, metric in answer.metrics.items():
        if not np.isfinite(metric):
            return f"the metric {name!r} is {metric}"
    return None


def close(a: float, b: float) -> bool:
    """Within what float32 sums of other orders differ by."""
    return bool(np.isclose(a, b, rtol=1e-5, atol=1e-6))


def finite(leaf: Any) -> np.ndarray:
    """Entry by entry, of any dtype."""
    return np.asarray(jnp.isfinite(leaf))


def where(bad: np.ndarray) -> str:
    """The first place that is bad, and how many more."""
    places = np.argwhere(bad)
    return f"at {places[0].tolist()}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")


def of(path: str) -> str:
    """Which leaf of x, where there are several."""
    return f" of x at {path!r}" if path else ""


def shaped(mask: np.ndarray, ndim: int) -> np.ndarray:
    """A mask [B, T] for arrays [B, T, ...]."""
    return mask.reshape(mask.shape + (1,) * (ndim - 2))


def float64(tree: PyTree) -> PyTree:
    """The tree with its floating-point leaves in float64 (complex128), where x64 is enabled."""

    def widen(leaf: Any) -> Any:
        for kind, wide in ((jnp.floating, np.float64), (jnp.complexfloating, np.complex128)):
            if jnp.issubdtype(jnp.result_type(leaf), kind):
                return jnp.asarray(np.asarray(leaf).astype(wide))
        return leaf

    return jax.tree.map(widen, tree)
