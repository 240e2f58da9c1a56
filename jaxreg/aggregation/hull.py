"""The shortest vector in the convex hull of the gradients: MGDA, and CAGrad."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, registered
from jaxreg.aggregation.nnls import Solution, nnls
from jaxreg.base.types import Array, PyTree

RIDGE = 1e-6  # relative to a gradient's own squared norm: below what float32 knows of it
HALVINGS = 32


def shortest(gramian: Array, present: Array) -> Solution:
    """Coefficients on the simplex whose combination is shortest; 0 for what is not present.

    With ``(Σz − 1)²`` as a penalty in place of the condition, the solution of any weight of the penalty is a
    multiple of the wanted one, so one program with ``z ≥ 0`` is enough.
    """
    diagonal = jnp.diagonal(gramian)
    least = jnp.min(jnp.where(present & (diagonal > 0), diagonal, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, 1)
    scaled = gramian / least
    q = scaled + RIDGE * jnp.diag(jnp.diagonal(scaled)) + 1
    both = present[:, None] & present[None, :]
    q = jnp.where(both, q, jnp.eye(len(q), dtype=q.dtype))
    found = nnls(q, jnp.where(present, 1.0, 0.0).astype(q.dtype))
    total = jnp.sum(found.z)
    return Solution(found.z / jnp.where(total > 0, total, 1), found.residual)


@registered
class MGDA(Aggregator):
    """The shortest vector in the convex hull of the gradients (Désidéri 2012).

    It conflicts with no gradient and is 0 exactly where the point is Pareto-stationary. The coefficients add
    up to 1, so the step is as short as the shortest gradient or shorter: small gradients decide. Gradients
    that are 0 are left out, where the paper would call the point stationary.

    Cost: one quadratic program of K variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import MGDA
      >>> [round(c, 3) for c in MGDA()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [0.8, 0.2]
    """

    non_conflicting: ClassVar[bool] = True

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        found = shortest(gramian, jnp.diagonal(gramian) > 0)
        return Combination(found.z, {"kkt_residual": found.residual})


@registered
class CAGrad(Aggregator):
    """The direction near the mean gradient that improves the worst-off term most (Liu et al. 2021).

    ``max over ‖d − g₀‖ ≤ c·‖g₀‖ of minᵢ gᵢ·d``, with the mean gradient g₀: ``g₀ + c·‖g₀‖·g_w/‖g_w‖``, where w
    on the simplex minimizes ``g_w·g₀ + c·‖g₀‖·‖g_w‖``.

    Args:
      c: the radius, from 0, the mean gradient, to below 1; the paper takes 0.4.
      norm_eps: where ``‖g_w‖`` is less than this part of the gradients' norm all together, the point counts
        as Pareto-stationary, and the coefficients are 0.

    Cost: some thirty quadratic programs of K variables, one after the other.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import CAGrad
      >>> [round(c, 3) for c in CAGrad(c=0.4)(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()]
      [0.7, 0.7]
    """

    c: float = 0.4
    norm_eps: float = 1e-4

    def _check(self) -> None:
        in_range("CAGrad", "c", self.c, 0.0, jnp.inf)
        in_range("CAGrad", "norm_eps", self.norm_eps, 0.0, 1.0)

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        count = len(gramian)
        trace = jnp.trace(gramian)
        gramian = gramian / jnp.where(trace > 0, trace, 1)  # the coefficients have no scale
        present = jnp.diagonal(gramian) > 0
        to_mean = jnp.mean(gramian, axis=1)
        mean = jnp.mean(to_mean)
        radius = self.c * jnp.sqrt(jnp.maximum(mean, 0))

        def at(length: Array) -> tuple[Array, Solution]:
            """The best w where ``‖g_w‖`` is replaced by ``(length + ‖g_w‖²/length)/2``, and its ``‖g_w‖``."""
            shift = length / jnp.where(radius > 0, radius, 1)
            moved = gramian + shift * (to_mean[:, None] + to_mean[None, :]) + shift**2 * mean
            found = shortest(moved, present)
            return jnp.sqrt(jnp.maximum(found.z @ gramian @ found.z, 0)), found

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = jnp.sqrt(low * high)
            longer = at(middle)[0] > middle
            return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

        one = jnp.ones((), gramian.dtype)
        low, high = lax.fori_loop(0, HALVINGS, halve, (self.norm_eps * one + 1e-7, one))
        length, found = at(jnp.sqrt(low * high))
        own = jnp.full(count, 1 / count, gramian.dtype)
        stationary = (length < self.norm_eps) & (radius > 0)
        towards = own + radius / jnp.where(length > 0, length, 1) * found.z
        coefficients = jnp.where(radius > 0, jnp.where(stationary, 0, towards), own)
        off = jnp.abs(jnp.log(jnp.maximum(length, 1e-30) / jnp.sqrt(low * high)))
        residual = jnp.where((radius > 0) & ~stationary, jnp.maximum(found.residual, off), 0)
        return Combination(coefficients, {"kkt_residual": jax.lax.stop_gradient(residual)})
