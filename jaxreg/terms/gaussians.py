"""The divergence of one Gaussian from another, for any mean and variance that float32 holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import log_limit
from jaxreg.base.types import Array
from jaxreg.terms.ratios import bounded, ratio_of


@jax.custom_jvp
def gaussian_divergence(gap: Array, log_var: Array, prior_log_var: Array) -> Array:
    """``½(σ²/s² + gap²/s² − 1 − log σ²/s²)`` of each dimension, with gap = μ − m; the prior has no gradient.

    Never below 0. A result that is no number of the dtype saturates, and so does the gradient, with its sign
    kept, so that a step still leads back. An infinite mean or variance is infinitely far away.
    """
    log_ratio = log_var - prior_log_var
    scaled = gap * ratio_of(-0.5 * prior_log_var)
    divergence = 0.5 * _excess(log_ratio) + 0.5 * jnp.square(scaled)
    infinite = jnp.isinf(gap) | jnp.isinf(log_ratio)
    return jnp.where(infinite, jnp.inf, jnp.minimum(divergence, _most(divergence)))


@gaussian_divergence.defjvp
def _gaussian_divergence_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # In closed form: what JAX makes of it is ∞ where a square overflows, and near 0 has no digit left.
    gap, log_var, prior_log_var = primals
    narrow = ratio_of(-0.5 * prior_log_var)
    of_mean = gap * narrow * narrow
    of_mean = jnp.clip(of_mean, -_most(of_mean), _most(of_mean))
    of_log_var = 0.5 * jnp.expm1(bounded(log_var - prior_log_var, log_limit(log_var.dtype)))
    return gaussian_divergence(*primals), of_mean * tangents[0] + of_log_var * tangents[1]


def _excess(d: Array) -> Array:
    """``e^d − 1 − d``, with all its digits near 0, where posteriors that have collapsed are."""
    near = jnp.abs(d) < jnp.finfo(d.dtype).eps ** 0.2
    small = jnp.where(near, d, 0.0)
    series = jnp.square(small) * (1 / 2 + small * (1 / 6 + small * (1 / 24 + small / 120)))
    return jnp.where(near, series, jnp.expm1(bounded(d, log_limit(d.dtype))) - d)


def _most(values: Array) -> Array:
    """A quarter of the largest number there is."""
    return jnp.asarray(jnp.finfo(values.dtype).max / 4, values.dtype)
