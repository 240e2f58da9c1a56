"""Norms and directions of vectors at any scale: no absolute floor, and no square that under- or overflows."""

from __future__ import annotations

import jax.numpy as jnp

from jaxreg.base.numbers import magnitude, safe_root, squared
from jaxreg.base.types import Array


def norms(vectors: Array, axis: int = -1) -> Array:
    """Euclidean norms along an axis; of a zero vector 0, with derivative 0."""
    size = magnitude(vectors, axis)
    return jnp.squeeze(size, axis) * safe_root(jnp.sum(squared(vectors / size), axis=axis))


def directions(vectors: Array, axis: int = -1) -> tuple[Array, Array]:
    """Unit vectors along an axis, and which are none since the vector is 0 (they stay 0, without a gradient).

    The second array keeps the axis, with length 1.
    """
    scaled = vectors / magnitude(vectors, axis)
    length = safe_root(jnp.sum(squared(scaled), axis=axis, keepdims=True))
    zero = length == 0  # not where it is NaN, which has to be seen
    return jnp.where(zero, jnp.zeros_like(scaled), scaled / jnp.where(zero, 1.0, length)), zero
