"""Onto the cone of directions that conflict with no gradient: UPGrad, and DualProj."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, one_of, registered, static
from jaxreg.aggregation.nnls import nnls
from jaxreg.aggregation.parts import parts, power_of_two
from jaxreg.base.types import Array, PyTree


@registered
class UPGrad(Aggregator):
    """Every gradient projected onto the dual cone of all, and the projections added up (Quinton & Rey 2024).

    ``Σᵢ argmin ‖d − gᵢ‖ over d with gⱼ·d ≥ 0 for all j``. Where no two gradients conflict it is the plain
    sum, with all coefficients 1; where they do, no term's loss grows to first order. A term's projection
    scales with its weight, and the cone does not depend on the weights at all.

    Args:
      reg_eps: what is added to the Gramian's diagonal, so that nearly parallel and opposite gradients have
        one solution; relative to ``relative_to``.
      relative_to: ``"diagonal"``, each term's own squared norm, so that small gradients are protected as
        large ones are; ``"trace"``, the sum of all, as TorchJD has it, where terms whose norm is less than a
        hundredth of the largest are hardly protected.

    Cost: K quadratic programs of K variables, [K, K] arithmetic inside the compiled step.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import UPGrad
      >>> UPGrad()(jnp.array([[1.0, 0.5], [0.5, 1.0]])).tolist()
      [1.0, 1.0]
      >>> [round(c, 3) for c in UPGrad()(jnp.array([[1.0, -0.5], [-0.5, 1.0]])).tolist()]
      [1.5, 1.5]
    """

    reg_eps: float = 1e-4
    relative_to: Literal["diagonal", "trace"] = static(default="diagonal")

    non_conflicting: ClassVar[bool] = True

    def _check(self) -> None:
        _check_regularization(self)

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        count = len(gramian)
        q, scales = _program(gramian, self.reg_eps, self.relative_to)
        # In multiples of the i-th gradient's own scale, so that no program knows the scale of another's.
        found = jax.vmap(lambda column: nnls(q, -column))(q)
        rows = jnp.eye(count, dtype=q.dtype) + found.z
        coefficients = jnp.sum(rows * (scales[:, None] / scales[None, :]), axis=0)
        return Combination(coefficients, {"kkt_residual": jnp.max(found.residual)})


@registered
class DualProj(Aggregator):
    """The plain sum projected onto the dual cone of the gradients (Lopez-Paz & Ranzato 2017, equation 11).

    ``argmin ‖d − Σgᵢ‖ over d with gⱼ·d ≥ 0 for all j``; the plain sum itself, where that conflicts with none.

    Args:
      reg_eps: as for `UPGrad`.
      relative_to: as for `UPGrad`.

    Cost: one quadratic program of K variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import DualProj
      >>> [round(c, 2) for c in DualProj()(jnp.array([[4.0, -1.0], [-1.0, 0.5]])).tolist()]
      [1.0, 2.0]
    """

    reg_eps: float = 1e-4
    relative_to: Literal["diagonal", "trace"] = static(default="diagonal")

    non_conflicting: ClassVar[bool] = True

    def _check(self) -> None:
        _check_regularization(self)

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        q, scales = _program(gramian, self.reg_eps, self.relative_to)
        own = scales / jnp.max(scales)
        found = nnls(q, -jnp.matmul(q, own, precision=jax.lax.Precision.HIGHEST))
        return Combination((own + found.z) / own, {"kkt_residual": found.residual})


def _program(gramian: Array, reg_eps: Array | float, relative_to: str) -> tuple[Array, Array]:
    """The matrix of the programs, and the scales that its variables are multiples of."""
    count, dtype = len(gramian), gramian.dtype
    if relative_to == "trace":
        trace = jnp.trace(gramian)
        q = gramian / jnp.where(trace > 0, trace, 1) + reg_eps * jnp.eye(count, dtype=dtype)
        return q, jnp.ones(count, dtype)
    split = parts(gramian)
    # In multiples of powers of two, which round nothing: next to reg_eps every digit counts.
    scales = power_of_two(split.divisors)
    q = gramian / scales[:, None] / scales[None, :]
    squares = jnp.where(split.present, jnp.diagonal(q), 1)  # not clipped: lengths are rounded
    most = jnp.outer(split.lengths / scales, split.lengths / scales)
    q = jnp.clip((q + q.T) / 2, -most, most)
    return jnp.fill_diagonal(q, squares + reg_eps * squares, inplace=False), scales


def _check_regularization(aggregator: UPGrad | DualProj) -> None:
    who = type(aggregator).__name__
    in_range(who, "reg_eps", aggregator.reg_eps, 1e-7, 1.0)
    one_of(who, "relative_to", aggregator.relative_to, ("diagonal", "trace"))
