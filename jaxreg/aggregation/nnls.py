"""Small quadratic programs with variables that are at least 0, solved inside the compiled step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.aggregation.parts import power_of_two
from jaxreg.base.types import Array

HIGHEST = lax.Precision.HIGHEST


class Solution(NamedTuple):
    """Attributes:
    z: [K], at least 0.
    residual: how far the conditions of Karush, Kuhn and Tucker are from being met, relative to the terms that
      are added up in them: near the dtype's rounding where it is solved.
    """

    z: Array
    residual: Array


class _State(NamedTuple):
    z: Array
    free: Array  # which variables may be above 0
    blocked: Array  # which were tried in vain since z has last changed
    newest: Array  # the variable that was freed last
    rounds: Array
    done: Array


def nnls(q: Array, b: Array) -> Solution:
    """``min ½·zᵀQz − bᵀz`` over ``z ≥ 0``, by the active-set method of Lawson and Hanson (1974, chapter 23).

    Args:
      q: [K, K], symmetric and positive definite.
      b: [K].
    """
    count, eps = len(b), float(jnp.finfo(b.dtype).eps)
    diagonal = jnp.diagonal(q)
    # The diagonal is near 1, whatever the terms' scales are, and no digit is rounded.
    scale = 1 / power_of_two(jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)))
    q, b = q * scale[:, None] * scale[None, :], b * scale
    size = jnp.max(jnp.abs(b))
    size = jnp.where(size > 0, size, 1)
    b = b / size

    def step(state: _State) -> _State:
        tried = solve_free(q, b, state.free)
        inside = jnp.all(jnp.where(state.free, tried > 0, True)) & jnp.all(jnp.isfinite(tried))
        fails = ~inside & (~jnp.isfinite(tried[state.newest]) | (tried[state.newest] <= 0))
        return jax.tree.map(
            lambda moved, back, without: jnp.where(inside, moved, jnp.where(fails, without, back)),
            _freed(state, tried),
            _stepped_back(state, tried),
            _without_newest(state),
        )

    def _freed(state: _State, tried: Array) -> _State:
        """All free variables are above 0: free the one that gains most, or end."""
        z = jnp.where(state.free, tried, 0)
        slope, noise = _slope(q, b, z, eps)
        blocked = jnp.where(jnp.any(z != state.z), False, state.blocked)
        wanted = ~state.free & ~blocked & (slope > noise)
        newest = jnp.argmax(jnp.where(wanted, slope, -jnp.inf))
        free = state.free | (jax.nn.one_hot(newest, count, dtype=bool) & jnp.any(wanted))
        return _State(z, free, blocked, newest, state.rounds + 1, ~jnp.any(wanted))

    def _stepped_back(state: _State, tried: Array) -> _State:
        """Some would be below 0: go as far as the first of them allows, and take it out."""
        leaving = state.free & (tried <= 0)
        room = jnp.where(leaving, state.z / jnp.where(leaving, state.z - tried, 1), jnp.inf)
        first = jnp.argmin(room)
        z = state.z + jnp.minimum(room[first], 1) * (jnp.where(state.free, tried, 0) - state.z)
        free = state.free & (z > 0) & ~jax.nn.one_hot(first, count, dtype=bool)
        return state._replace(z=jnp.where(free, z, 0), free=free, rounds=state.rounds + 1)

    def _without_newest(state: _State) -> _State:
        """The one just freed cannot be above 0, but for rounding: leave it, until something changes."""
        it = jax.nn.one_hot(state.newest, count, dtype=bool)
        free = state.free & ~it
        # Only what is wanted is freed, so without it z is as it was, and the next round looks for another.
        return state._replace(free=free, blocked=state.blocked | it, rounds=state.rounds + 1)

    nothing = jnp.zeros(count, bool)
    first = _State(jnp.zeros_like(b), nothing, nothing, jnp.asarray(0), jnp.asarray(0), jnp.asarray(False))
    last = lax.while_loop(lambda state: ~state.done & (state.rounds < 6 * count + 10), step, first)
    z = jnp.maximum(last.z, 0)
    slope, _ = _slope(q, b, z, eps)
    terms = jnp.matmul(jnp.abs(q), z, precision=HIGHEST) + jnp.abs(b)
    off = jnp.where(z > 0, jnp.abs(slope), jnp.maximum(slope, 0))
    return Solution(z * size * scale, jnp.max(off) / jnp.maximum(jnp.max(terms), 1e-30))


def _slope(q: Array, b: Array, z: Array, eps: float) -> tuple[Array, Array]:
    """``b − Qz``, and how much of it may be rounding."""
    slope = b - jnp.matmul(q, z, precision=HIGHEST)
    return slope, 4 * eps * (jnp.matmul(jnp.abs(q), z, precision=HIGHEST) + jnp.abs(b))


def solve_free(q: Array, b: Array, free: Array) -> Array:
    """The minimum over the free variables, the others being 0; refined once, for it is in float32."""
    both = free[:, None] & free[None, :]
    own = jnp.where(both, q, jnp.eye(len(b), dtype=q.dtype))
    wanted = jnp.where(free, b, 0)
    root = lax.linalg.cholesky(own, symmetrize_input=False)

    def solved(right: Array) -> Array:
        half = lax.linalg.triangular_solve(root, right[:, None], left_side=True, lower=True)
        return lax.linalg.triangular_solve(root, half, left_side=True, lower=True, transpose_a=True)[:, 0]

    z = solved(wanted)
    return z + solved(wanted - jnp.matmul(own, z, precision=HIGHEST))
