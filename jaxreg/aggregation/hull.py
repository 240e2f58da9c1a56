"""The shortest vector in the convex hull of the gradients: MGDA, and CAGrad."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxreg.aggregation.aggregator import Aggregator, Combination, in_range, registered
from jaxreg.aggregation.nnls import Solution, nnls, solve_free
from jaxreg.aggregation.parts import length_of, parts
from jaxreg.base.types import Array, PyTree

RIDGE = 1e-6  # relative to a gradient's own squared norm: near what float32 knows of it
MOST = 50  # programs of a search; five to ten are usual


@registered
class MGDA(Aggregator):
    """The shortest vector in the convex hull of the gradients (Désidéri 2012).

    It conflicts with no gradient and is 0 exactly where the point is Pareto-stationary. The coefficients add
    up to 1, so the step is as short as the shortest gradient or shorter: small gradients decide. Gradients
    that are 0 are left out, where the paper would call the point stationary.

    Metrics: ``kkt_residual``.

    Cost: one quadratic program of K variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import MGDA
      >>> [round(c, 3) for c in MGDA()(jnp.array([[1.0, 0.0], [0.0, 4.0]])).tolist()]
      [0.8, 0.2]
    """

    non_conflicting: ClassVar[bool] = True

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        found = shortest(gramian)
        return Combination(found.z, {"kkt_residual": found.residual})


def shortest(gramian: Array) -> Solution:
    """Coefficients on the simplex whose combination is shortest; 0 for gradients that are 0.

    With ``(Σz − 1)²`` as a penalty in place of the condition, the solution of any weight of the penalty is a
    multiple of the wanted one, so one program with ``z ≥ 0`` is enough. Its variables are multiples of unit
    gradients, of which the shortest gradient's counts 1 in the sum and the others' less, so that 1e-15 may
    stand beside 1e15.
    """
    split = parts(gramian)
    shares = _shares(split.lengths, split.present)
    eye = jnp.eye(len(shares), dtype=shares.dtype)
    found = nnls(split.cosines + RIDGE * eye + shares[:, None] * shares[None, :], shares)
    z = shares * found.z
    total = jnp.sum(z)
    return Solution(z / jnp.where(total > 0, total, 1), found.residual)


def _shares(lengths: Array, present: Array) -> Array:
    """[K]: the shortest length over each; 0 for gradients that are 0."""
    least = jnp.min(jnp.where(present, lengths, jnp.inf))
    return jnp.where(present, jnp.where(present, least, 0) / jnp.where(present, lengths, 1), 0)


class _Search(NamedTuple):
    """For the gain m that is asked of every term: ``x ≥ 0`` that gives it with the shortest ``Σ xᵢ uᵢ``."""

    low: Array  # an m whose combination is shorter than the radius
    high: Array  # one whose combination is longer
    m: Array
    x: Array
    length: Array
    residual: Array
    rounds: Array


@registered
class CAGrad(Aggregator):
    """The direction near the mean gradient that improves the worst-off term most (Liu et al. 2021).

    ``max over ‖d − g₀‖ ≤ c·‖g₀‖ of minᵢ gᵢ·d``, with the mean gradient g₀ over all K: ``g₀ +
    c·‖g₀‖·g_w/‖g_w‖``, where w on the simplex minimizes ``g_w·g₀ + c·‖g₀‖·‖g_w‖``. Gradients that are 0 have
    no share in w, or the worst-off would always be one of them.

    Args:
      c: the radius, from 0, the mean gradient, to below 1; the paper takes 0.4.
      norm_eps: where ``‖g_w‖`` is less than this part of ``Σ wᵢ‖gᵢ‖``, whose rest has cancelled, the point
        counts as Pareto-stationary, and the coefficients are 0. (TorchJD compares with the root of all
        squares, so that there one gradient 1e-4 times as long as the others stops the training.)

    Metrics: ``kkt_residual``, of the last program and the radius, or what cancels where that is more.

    Cost: five to ten quadratic programs of K variables, one after the other; fifty where it is stationary.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import CAGrad
      >>> [round(c, 3) for c in CAGrad(c=0.4)(jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()]
      [0.7, 0.7]
    """

    c: float = 0.4
    norm_eps: float = 1e-3

    def _check(self) -> None:
        in_range("CAGrad", "c", self.c, 0.0, jnp.inf)
        in_range("CAGrad", "norm_eps", self.norm_eps, 0.0, 1.0)

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        split, count, dtype = parts(gramian), len(gramian), gramian.dtype
        eps = jnp.finfo(dtype).eps
        largest = jnp.max(split.divisors * split.present)
        own = split.lengths / jnp.where(largest > 0, largest, 1) / count  # the mean, in unit gradients
        to_mean = jnp.sum(split.cosines * own[None, :], axis=1)
        mean = length_of(split.cosines, own)
        radius = jnp.asarray(self.c, dtype) * mean
        q = split.cosines + RIDGE * jnp.eye(count, dtype=dtype)
        shares = _shares(split.lengths, split.present)
        found = _on_the_sphere(q, shares, to_mean, mean, radius, split.present)
        length, total = length_of(split.cosines, found.x), jnp.sum(found.x)
        stationary = (radius > 0) & (length <= self.norm_eps * total)
        moved = own + found.x * jnp.where(length > 0, radius / jnp.where(length > 0, length, 1), 0)
        scaled = moved * (jnp.where(largest > 0, largest, 1) / split.divisors)
        plain = jnp.full(count, 1 / count, dtype)
        coefficients = jnp.where(split.present, scaled, plain)
        off = jnp.abs(found.length / jnp.where(radius > 0, radius, 1) - 1)
        lost = eps * jnp.square(total / jnp.where(length > 0, length, 1))
        residual = jnp.where(
            (radius > 0) & ~stationary, jnp.maximum(jnp.maximum(found.residual, off), lost), 0
        )
        coefficients = jnp.where(radius > 0, jnp.where(stationary, 0, coefficients), plain)
        return Combination(coefficients, {"kkt_residual": residual})


def _on_the_sphere(
    q: Array, shares: Array, to_mean: Array, mean: Array, radius: Array, present: Array
) -> _Search:
    """The gain m for which the nearest d with ``uᵢ·d ≥ m·shareᵢ`` is the radius away from the mean.

    d is the mean and ``Σ xᵢ uᵢ``, where x solves one program with ``x ≥ 0``. Its distance rises with m, and
    is the root of a quadratic as long as the same x are above 0, so that a step to where that reaches the
    radius is exact at the end; where one would leave what is known of m, that is halved.
    """
    eps = jnp.finfo(q.dtype).eps

    def at(m: Array, low: Array, high: Array, rounds: Array) -> _Search:
        found = nnls(q, jnp.where(present, m * shares - to_mean, 0))
        length = length_of(q, found.z)
        shorter = length < radius
        return _Search(
            jnp.where(shorter, m, low),
            jnp.where(shorter, high, m),
            m,
            found.z,
            length,
            found.residual,
            rounds + 1,
        )

    def step(now: _Search) -> _Search:
        free = now.x > 0
        slope = jnp.where(free, solve_free(q, jnp.where(free, shares, 0), free), 0)
        # ‖x + t·slope‖² = radius², of the two t the larger; written without cancellation.
        a, b = length_of(q, slope) ** 2, jnp.sum(now.x * jnp.sum(q * slope[None, :], axis=1))
        c = (now.length - radius) * (now.length + radius)
        root = jnp.sqrt(jnp.maximum(b * b - a * c, 0))
        t = jnp.where(b > 0, -c / jnp.where(b > 0, b + root, 1), (root - b) / jnp.where(a > 0, a, 1))
        aim = now.m + t
        good = (a > 0) & (aim > now.low) & (aim < now.high)
        halved = now.low + (now.high - now.low) / 2
        return at(jnp.where(good, aim, halved), now.low, now.high, now.rounds)

    def unfinished(now: _Search) -> Array:
        close = jnp.abs(now.length - radius) <= 4 * eps * radius
        return (now.rounds < MOST) & ~close & (now.high - now.low > 0) & jnp.isfinite(now.length)

    # Without any x it is the mean itself, which gains so much; and no d gains more than its length.
    low = jnp.min(jnp.where(present, to_mean / jnp.where(shares > 0, shares, 1), jnp.inf))
    low = jnp.where(jnp.isfinite(low), low, 0)
    high = (mean + radius) * (1 + 8 * eps)
    # At m = 0 there always is one.
    return lax.while_loop(unfinished, step, at(jnp.clip(0, low, high), low, high, jnp.asarray(0)))
