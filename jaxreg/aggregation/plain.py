"""Coefficients that do not read the Gramian: Sum, Mean, Random."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxreg.aggregation.aggregator import Aggregator, Combination, registered
from jaxreg.base.types import Array, PyTree


@registered
class Sum(Aggregator):
    """The plain sum: all coefficients are 1. The baseline to compare with.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import Sum
      >>> Sum()(jnp.eye(2)).tolist()
      [1.0, 1.0]
    """

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        return Combination(jnp.ones(len(gramian), gramian.dtype), {})


@registered
class Mean(Aggregator):
    """The mean of the weighted gradients: all coefficients are 1/K.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxreg.aggregation import Mean
      >>> Mean()(jnp.eye(2)).tolist()
      [0.5, 0.5]
    """

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        return Combination(jnp.full(len(gramian), 1 / len(gramian), gramian.dtype), {})


@registered
class Random(Aggregator):
    """Coefficients drawn anew at every step, the softmax of normal numbers (Lin et al. 2022): the baseline
    that every method has to beat. They add up to 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxreg.aggregation import Random
      >>> round(float(Random()(jnp.eye(3), key=jax.random.key(0)).sum()), 3)
      1.0
    """

    needs_key: ClassVar[bool] = True

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        assert key is not None
        return Combination(jax.nn.softmax(jax.random.normal(key, (len(gramian),), gramian.dtype)), {})
