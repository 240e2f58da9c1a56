"""What bargaining among the terms would agree on: Nash-MTL, and FairGrad."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, registered, static
from jaxreg.aggregation.parts import parts
from jaxreg.base.types import Array, PyTree

HIGHEST = jax.lax.Precision.HIGHEST
RIDGE = 1e-6  # of opposite gradients there is no agreement; with it there is one, far away
MOST = 100


class Agreement(NamedTuple):
    """Attributes:
    y: [K], above 0.
    residual: how far the equation is from being met, relative to its right side.
    """

    y: Array
    residual: Array


def agreement(cosines: Array, right: Array, power: Array | float, present: Array) -> Agreement:
    """``y > 0`` with ``C·y = right · y^(−power)``, by a damped Newton method in log y.

    It is where the convex ``½·yᵀCy − Σ right·y^(1−power)/(1−power)`` is least; its Hessian times y on both
    sides is what log y needs, up to a part that vanishes at the solution.
    """
    count = len(right)
    ridged = cosines + RIDGE * jnp.eye(count, dtype=cosines.dtype)
    first = jnp.log(right) / (1 + power)  # of gradients that are orthogonal

    def off(logs: Array) -> tuple[Array, Array, Array]:
        y = jnp.exp(logs)
        left, given = jnp.matmul(ridged, y, precision=HIGHEST), right * jnp.exp(-power * logs)
        return y, left, given

    def worth(logs: Array) -> Array:
        _, left, given = off(logs)
        return jnp.max(jnp.where(present, jnp.abs(left - given) / given, 0))

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        logs, _, rounds = carry
        y, left, given = off(logs)
        slope = (left - given) * y
        hessian = y[:, None] * ridged * y[None, :] + jnp.diag(power * given * y)
        # The diagonal is scaled away: the terms' agreements may differ by many powers of ten.
        scale = lax.rsqrt(jnp.diagonal(hessian))
        root = lax.linalg.cholesky(hessian * scale[:, None] * scale[None, :], symmetrize_input=False)
        half = lax.linalg.triangular_solve(root, (slope * scale)[:, None], left_side=True, lower=True)
        change = lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)[:, 0]
        change = -change * scale
        decrement = jnp.sqrt(jnp.maximum(-slope @ change, 0))
        # In y the step is y·change, damped as for a self-concordant function; far steps go by their
        # logarithm.
        size = jnp.where(decrement > 0.25, 1 / (1 + decrement), 1.0)
        moved = logs + jnp.log1p(jnp.clip(size * change, -0.9, 9.0))
        usable = jnp.all(jnp.isfinite(moved))
        moved = jnp.where(usable, moved, logs)
        return moved, worth(moved), jnp.where(usable, rounds + 1, MOST)

    def goes_on(carry: tuple[Array, Array, Array]) -> Array:
        _, residual, rounds = carry
        return (rounds < MOST) & (residual > 4 * jnp.finfo(right.dtype).eps)

    logs, residual, _ = lax.while_loop(goes_on, step, (first, worth(first), jnp.asarray(0)))
    return Agreement(jnp.exp(logs), residual)


@registered
class FairGrad(Aggregator):
    """The α-fair allocation of progress among the terms (Ban & Ji 2024): ``G·c = c^(−1/α)``, c > 0.

    Args:
      alpha: 1, proportional fairness, is the bargaining of `NashMTL`; 2, minimal potential delay; towards ∞,
        the worst-off counts alone; 0 is the mean.

    The coefficients' scale depends on that of the gradients: ``1/‖g‖`` at α = 1, so that all steps have about
    the length √K. Of gradients that are opposite there is no solution, and the residual says so.

    Cost: some ten linear systems [K, K].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import FairGrad
      >>> [round(c, 3) for c in FairGrad()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [1.0, 0.5]
    """

    alpha: float = 1.0

    linear: ClassVar[bool] = False

    def _check(self) -> None:
        in_range("FairGrad", "alpha", self.alpha, 0.0, jnp.inf)

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split, count = parts(gramian), len(gramian)
        alpha = jnp.asarray(self.alpha, gramian.dtype)
        power = 1 / jnp.where(alpha > 0, alpha, 1)
        # In y = c·‖g‖ the equation is C·y = ‖g‖^(power−1)·y^(−power). The powers are taken of a length near
        # 1.
        typical = jnp.exp(jnp.mean(jnp.log(split.divisors)))
        right = (split.divisors / typical) ** (power - 1)
        found = agreement(split.cosines, right, power, split.present)
        # y scales as typical^((power−1)/(power+1)), and c as that over the length.
        scale = typical ** ((power - 1) / (power + 1))
        coefficients = found.y * (scale / split.divisors)
        plain = jnp.full(count, 1 / count, gramian.dtype)
        coefficients = jnp.where(alpha > 0, jnp.where(split.present, coefficients, 1), plain)
        return Combination(coefficients, {"residual": jnp.where(alpha > 0, found.residual, 0)})


@registered
class NashMTL(Aggregator):
    """The Nash bargaining solution (Navon et al. 2022): ``(G/‖G‖)·c = 1/c``, c > 0.

    Args:
      max_norm: the longest that the combination may be; 0 for no limit. The paper takes 1.
      update_every: how many steps a solution is used for (static).

    Its state is ``{"coefficients": [K], "step": int32}``. Of gradients that are opposite there is no
    agreement, and the residual says so.

    Cost: some ten linear systems [K, K], at every ``update_every``-th step.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import NashMTL
      >>> [round(c, 3) for c in NashMTL(max_norm=0)(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()]
      [1.189, 1.189]
    """

    max_norm: float = 1.0
    update_every: int = static(default=1)

    stateful: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def _check(self) -> None:
        in_range("NashMTL", "max_norm", self.max_norm, 0.0, jnp.inf)
        in_range("NashMTL", "update_every", self.update_every, 1, jnp.inf)

    def init(self, count: int) -> PyTree:
        """Coefficients of 1, which the first step replaces."""
        return {"coefficients": jnp.ones(count, jnp.result_type(float)), "step": jnp.zeros((), jnp.int32)}

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split = parts(gramian)
        ones = jnp.ones_like(split.lengths)
        found = agreement(split.cosines, ones, 1.0, split.present)
        largest = jnp.max(split.divisors)
        norm = jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(gramian / largest / largest))))  # ‖G‖^½ over the largest
        bargained = jnp.where(split.present, found.y * (norm * (largest / split.divisors)), 1)
        fresh = state["step"] % self.update_every == 0
        kept = jnp.where(fresh, bargained, state["coefficients"].astype(gramian.dtype))
        following = {"coefficients": kept.astype(state["coefficients"].dtype), "step": state["step"] + 1}
        scaled = kept * (split.lengths / largest)
        length = largest * jnp.sqrt(jnp.maximum(scaled @ split.cosines @ scaled, 0))
        limit = jnp.where(jnp.asarray(self.max_norm) > 0, self.max_norm, jnp.inf)
        shorter = jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)
        return Combination(kept * shorter, {"residual": jnp.where(fresh, found.residual, 0)}, following)
