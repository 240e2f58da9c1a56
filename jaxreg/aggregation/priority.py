"""The base loss first, and some progress guaranteed to every other term: PCD."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, registered
from jaxreg.aggregation.nnls import nnls
from jaxreg.aggregation.parts import parts
from jaxreg.base.types import Array, PyTree

RIDGE = 1e-6


@registered
class PCD(Aggregator):
    """Priority-constrained descent (Varam et al. 2026): as near to the first gradient as can be, while every
    other term gets a share of the progress that its own gradient would make.

    ``argmin ‖d − g̃₁‖ over d with g̃ⱼ·d ≥ τ·‖g̃ⱼ‖² for j > 1``, where each gradient is divided by the root of a
    moving average of its squared norm; then as long as g₁. The first row, the base loss, is the primary one.
    Where the conditions exclude one another, it is g₁ alone.

    Args:
      tau: the share, from 0 to 1.
      beta: the decay of the moving averages.
      eps: what is added to a moving average.

    The residual, ``kkt_residual``, is 1 where the conditions exclude one another.

    Its state is ``{"squares": [K], "step": int32}``.

    Cost: one quadratic program of K variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import PCD
      >>> [round(c, 3) for c in PCD(tau=0.0)(jnp.array([[1.0, -0.5], [-0.5, 1.0]])).tolist()]
      [1.155, 0.577]
    """

    tau: float = 0.02
    beta: float = 0.999
    eps: float = 1e-8

    stateful: ClassVar[bool] = True
    asymmetric: ClassVar[bool] = True
    linear: ClassVar[bool] = False  # eps has a scale

    def _check(self) -> None:
        in_range("PCD", "tau", self.tau, 0.0, 1.0)
        in_range("PCD", "beta", self.beta, 0.0, 1.0)
        in_range("PCD", "eps", self.eps, 0.0, jnp.inf)

    def init(self, count: int) -> PyTree:
        """Averages of nothing yet."""
        return {"squares": jnp.zeros(count, jnp.result_type(float)), "step": jnp.zeros((), jnp.int32)}

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split, count = parts(gramian), len(gramian)
        dtype = gramian.dtype
        squares = self.beta * state["squares"].astype(dtype) + (1 - self.beta) * jnp.diagonal(gramian)
        step = state["step"] + 1
        average = squares / (1 - jnp.asarray(self.beta, dtype) ** step)
        # Lengths of the normalized gradients: near 1, unless a step is unusual.
        own = split.lengths / jnp.sqrt(jnp.where(average + self.eps > 0, average + self.eps, 1))
        second = (jnp.arange(count) > 0) & (own > 0)
        both = second[:, None] & second[None, :]
        eye = jnp.eye(count, dtype=dtype)
        q = jnp.where(both, split.cosines + RIDGE * eye, eye)
        # In multiples of unit gradients: cosines·z ≥ τ·own − cosine to the first times its length.
        b = jnp.where(second, self.tau * own - split.cosines[:, 0] * own[0], 0)
        found = nnls(q, b)
        units = found.z + eye[0] * own[0]
        reached = split.cosines @ units - self.tau * own
        size = jnp.sum(jnp.abs(units))
        possible = jnp.min(jnp.where(second, reached, jnp.inf)) >= -1e-4 * size
        length = jnp.sqrt(jnp.maximum(units @ split.cosines @ units, 0))
        nothing = length <= 1e-6 * size
        scaled = units * (split.lengths[0] / jnp.where(nothing, 1, length)) / split.divisors
        combined = jnp.where(nothing, 0, scaled)
        coefficients = jnp.where(possible & (own[0] > 0), combined, jnp.where(own[0] > 0, eye[0], 0))
        following = {"squares": squares.astype(state["squares"].dtype), "step": step}
        # What cancels in the direction has lost digits.
        lost = jnp.finfo(dtype).eps * size / jnp.where(length > 0, length, 1)
        residual = jnp.where(possible, jnp.maximum(found.residual, lost), 1)
        return Combination(coefficients, {"kkt_residual": residual}, following)
