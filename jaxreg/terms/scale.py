"""Norms and directions of vectors at any scale: no absolute floor, and no square that under- or overflows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import safe_root
from jaxreg.base.types import Array


def norms(vectors: Array, axis: int = -1) -> Array:
    """Euclidean norms along an axis; of a zero vector 0, with derivative 0."""
    scaled, size = _scaled(vectors, axis)
    return jnp.squeeze(size, axis) * safe_root(jnp.sum(jnp.square(scaled), axis=axis))


def directions(vectors: Array, axis: int = -1) -> tuple[Array, Array]:
    """Unit vectors along an axis, and which are none since the vector is 0 (they stay 0, without a gradient).

    The second array keeps the axis, with length 1.
    """
    scaled, _ = _scaled(vectors, axis)
    length = safe_root(jnp.sum(jnp.square(scaled), axis=axis, keepdims=True))
    zero = length == 0  # not where it is NaN, which has to be seen
    return jnp.where(zero, jnp.zeros_like(scaled), scaled / jnp.where(zero, 1.0, length)), zero


def _scaled(vectors: Array, axis: int) -> tuple[Array, Array]:
    """Vectors over their largest magnitude, and that (1 for a zero vector), which has no gradient."""
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(vectors)), axis=axis, keepdims=True, initial=0.0)
    size = jnp.where(size == 0, jnp.ones_like(size), size)
    return vectors / size, size
