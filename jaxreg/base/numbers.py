"""The few scalar rules that everything here computes by."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxreg.base.types import Array


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for every narrower or non-floating dtype, float64 for float64."""
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widened(x: Any) -> Array:
    """x as an array of its accumulation dtype."""
    return jnp.asarray(x, accumulation_dtype(jnp.result_type(x)))


def safe_root(square: Array) -> Array:
    """The square root, with derivative 0 at 0, so that norms may be differentiated themselves."""
    zero = square == 0  # not `<= 0`: the root of a negative number or of NaN has to stay NaN
    return jnp.where(zero, jnp.zeros_like(square), jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square)))
