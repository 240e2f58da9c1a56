"""The largest and the smallest of values a token: of what counts, never of padding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.masked import counts


def largest(batch: TokenBatch, values: Array, among: Any = True) -> Array:
    """The largest of values [B, T, ...], of either sign, over the tokens that count; 0 if none does.

    In a part of a batch it is −∞ then, so that the largest of the parts' is the whole's.

    Args:
      batch: says which tokens count.
      values: [B, T, ...]. No gradient.
      among: bool, of the shape of values: only these.
    """
    counted = counts(batch).reshape(batch.shape + (1,) * (values.ndim - 2)) & among
    found = jnp.max(jnp.where(counted, jax.lax.stop_gradient(values), -jnp.inf), initial=-jnp.inf)
    if batch.totals is not None:
        return found
    return jnp.where(jnp.any(counted), found, jnp.zeros_like(found))


def smallest(batch: TokenBatch, values: Array, among: Any = True) -> Array:
    """`largest`, at the other end."""
    return -largest(batch, -values, among)
