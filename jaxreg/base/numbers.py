"""The few scalar rules that everything here computes by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for every narrower or non-floating dtype, float64 for float64; of complex numbers their own."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def log_limit(dtype: Any) -> float:
    """The largest whole log-ratio whose exponential the dtype holds: 88 in float32, 709 in float64."""
    return 709.0 if jnp.finfo(dtype).bits > 32 else 88.0


def widened(x: Any) -> Array:
    """x as an array of its accumulation dtype."""
    return jnp.asarray(x, accumulation_dtype(jnp.result_type(x)))


def safe_root(square: Array) -> Array:
    """The square root, with derivative 0 at 0, so that norms may be differentiated themselves."""
    zero = square == 0  # not `<= 0`: the root of a negative number or of NaN has to stay NaN
    return jnp.where(zero, jnp.zeros_like(square), jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square)))


def squared(x: Array) -> Array:
    """``|x|²``, which is real for complex numbers, too."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


def magnitude(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The power of two next to the largest |x| (1 where that is 0 or not finite), with the axes kept.

    What is divided by it keeps every digit and may be squared: its largest number is within ½ … 4. It has no
    gradient, so that a function of degree 1, ``m·f(x / m)``, keeps its own.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True, initial=0.0)
    limit = jnp.finfo(largest.dtype).maxexp - 2  # the inverse is no subnormal number either
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest)))
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -limit, limit))
