"""Ratios of probabilities: exponentials that stay finite, and sums of them that do.

A log-ratio of ±100 is ordinary input: two engines that disagree about one rare token give it. Its exponential
is no float32. So a ratio saturates at exp(88) (exp(709) in float64), and there, as at a clip, its gradient is
0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import log_limit
from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.extremes import largest, smallest
from jaxreg.terms.masked import Reduction, reduce_tokens

_LARGE, _SCALE = 2.0**96, 2.0**-64  # powers of two: scaling by them rounds nothing


def bounded(log_ratio: Array, limit: Any) -> Array:
    """min(log_ratio, limit), with all of the gradient up to the limit itself and none beyond."""
    return jnp.where(log_ratio > limit, jnp.asarray(limit, log_ratio.dtype), log_ratio)


def ratio_of(log_ratio: Array, factor: Any = 1.0) -> Array:
    """exp(log_ratio), saturated where it, or its product with the factor, is no number of the dtype."""
    room = jnp.log(jnp.maximum(jnp.abs(jnp.asarray(factor, log_ratio.dtype)), 1.0))
    return jnp.exp(bounded(log_ratio, log_limit(log_ratio.dtype) - jax.lax.stop_gradient(room)))


def k3(log_ratio: Array, limit: float | None = None) -> Array:
    """exp(d) − d − 1 of a log-ratio d bounded by the limit (None: the dtype's), and constant beyond."""
    d = bounded(log_ratio, log_limit(log_ratio.dtype) if limit is None else limit)
    return jnp.expm1(d) - d


def perplexity(nats: Array) -> Array:
    """exp of a mean in nats, saturated where it is no number of the dtype; infinite where the mean is."""
    return jnp.where(jnp.isinf(nats), jnp.exp(nats), ratio_of(nats))


def reduce_large(tokens: TokenBatch, values: Array, reduction: Reduction) -> Array:
    """`reduce_tokens` of finite values up to the largest number that there is: the sum is finite, too.

    Where a value is above 2⁹⁶ all are scaled down by 2⁻⁶⁴ before they are summed, and a total that is no
    number of the dtype saturates at the largest that is. The gradient is that of the sum.
    """
    size = largest(tokens, jnp.abs(values))
    return _summed(lambda scaled: reduce_tokens(tokens, scaled, reduction), values, size)


def mean_large(tokens: TokenBatch, values: Array) -> Array:
    """`TokenBatch.mean`, likewise."""
    return _summed(tokens.mean, values, largest(tokens, jnp.abs(values)))


def sum_large(values: Array) -> Array:
    """The sum of all of an array, likewise."""
    return _summed(jnp.sum, values, jnp.max(jnp.abs(jax.lax.stop_gradient(values)), initial=0.0))


def ratio_metrics(tokens: TokenBatch, log_ratio: Array, counted: Array) -> dict[str, Array]:
    """What all losses on ratios report: r's mean, largest and smallest, and k3's estimate of a KL."""
    log_ratio = jax.lax.stop_gradient(log_ratio)
    ratio = ratio_of(log_ratio)
    return {
        "ratio_mean": mean_large(tokens, ratio),
        "ratio_max": largest(tokens, ratio, counted),
        "ratio_min": smallest(tokens, ratio, counted),
        "kl": mean_large(tokens, k3(log_ratio)),
    }


def _summed(reduce: Callable[[Array], Array], values: Array, size: Array) -> Array:
    """reduce(values), of which the largest that counts is of this size."""
    scale = jnp.where((size > _LARGE) & (size < jnp.inf), _SCALE, 1.0).astype(values.dtype)
    total = reduce(values * scale)
    # Infinite values are infinite on purpose; only what overflows on the way saturates.
    limit = jnp.where(size < jnp.inf, jnp.finfo(total.dtype).max * scale, jnp.inf)
    held = jax.lax.stop_gradient(jnp.clip(total, -limit, limit))
    return jnp.where(jnp.isinf(total), total, held + (total - jax.lax.stop_gradient(total))) / scale
