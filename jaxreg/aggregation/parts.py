"""A Gramian taken apart: the gradients' lengths, and the angles between them, which have no scale."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxreg.base.types import Array


class Parts(NamedTuple):
    """``gramian = lengths · cosines · lengths``.

    Attributes:
      lengths: [K]; 0 for a gradient that is 0.
      divisors: [K], the lengths, and 1 where they are 0.
      cosines: [K, K], 1 on the diagonal; 0 beside a gradient that is 0.
      present: [K], whether a gradient is not 0.
    """

    lengths: Array
    divisors: Array
    cosines: Array
    present: Array


def parts(gramian: Array) -> Parts:
    """The lengths and the cosines of a finite Gramian."""
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    present = lengths > 0
    divisors = jnp.where(present, lengths, 1)
    both = present[:, None] & present[None, :]
    ratio = gramian / divisors[:, None] / divisors[None, :]  # the product of two lengths may leave the range
    ratio = jnp.where(both, jnp.clip((ratio + ratio.T) / 2, -1, 1), 0)
    return Parts(lengths, divisors, jnp.where(jnp.eye(len(lengths), dtype=bool), 1, ratio), present)


def power_of_two(values: Array) -> Array:
    """The next power of two above each of positive numbers: to divide by it rounds nothing."""
    _, exponent = jnp.frexp(values)
    return jnp.ldexp(jnp.ones_like(values), exponent)


def length_of(cosines: Array, weights: Array) -> Array:
    """The length of ``Σ weightᵢ·unit gradientᵢ``."""
    return jnp.sqrt(jnp.maximum(weights @ cosines @ weights, 0))
