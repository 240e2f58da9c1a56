"""How values of tokens become one number, or one a datum, by what counts."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array, ArrayLike
from jaxreg.batch.counting import counted
from jaxreg.batch.shards import refuse_own_mean
from jaxreg.batch.totals import Totals


class Reductions:
    """The reductions of a `TokenBatch`, by its mask [B, T] and weights [B, T] or [B, T, K]."""

    mask: Array
    weights: Array
    totals: Totals | None  # the whole's, where this is a part
    local: bool  # whether means of one device's own tokens are meant, inside shard_map

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), padding included."""
        rows, length = self.mask.shape
        return rows, length

    @property
    def counted(self) -> Array:
        """bool [B, T], the real tokens with a weight that is not 0: what a sequence-level quantity is of.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> batch = jr.TokenBatch.from_arrays(weights=jnp.array([[0.0, 0.0, 1.0, 0.5]]))
          >>> batch.mask.sum(1).tolist(), batch.counted.sum(1).tolist()  # the prompt too, the answer
          ([4], [2])
        """
        array: Array = counted(self.mask, self.weights, self.shape)
        return array

    def where(self, values: Array, fill: ArrayLike = 0.0) -> Array:
        """``values`` [B, T, ...] where tokens are real, ``fill`` elsewhere.

        Put before a function that has no finite derivative at what padding may hold: the gradient
        of a padded token is then exactly 0, and never 0 · ∞.
        """
        if jnp.shape(values)[:2] != self.shape:
            raise ValueError(
                f"where takes values [B, T, ...] with (B, T) = {self.shape}, got {jnp.shape(values)}"
            )
        mask = self.mask.reshape(self.mask.shape + (1,) * (jnp.ndim(values) - 2))
        return jnp.where(mask, values, jnp.asarray(fill, jnp.result_type(values)))

    def sum(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Σ weight·value over all tokens (``token_sum``): a scalar."""
        weighted, _ = self._weighted(values, weights)
        return jnp.sum(weighted)

    def mean(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Σ weight·value / Σ weight over all tokens (``token_mean``): a scalar.

        Of a part of a batch, its share of the whole's mean: Σ weight is the whole's.
        """
        self.check_whole("mean")
        weighted, weight = self._weighted(values, weights)
        if self.totals is not None:
            return _ratio(jnp.sum(weighted), *self._whole(self.totals, weighted, weights))
        return _ratio(jnp.sum(weighted), jnp.sum(weight), jnp.any(weight != 0))

    def datum_sum(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Σ weight·value over each datum's tokens: [B]."""
        weighted, _ = self._weighted(values, weights)
        return jnp.sum(weighted.reshape(weighted.shape[0], -1), axis=1)

    def datum_means(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Each datum's own weighted mean: [B], 0 where a datum has no weight."""
        weighted, weight = self._weighted(values, weights)
        weighted, weight = (a.reshape(a.shape[0], -1) for a in (weighted, weight))
        some = jnp.any(weight != 0, axis=1)
        return _ratio(jnp.sum(weighted, axis=1), jnp.sum(weight, axis=1), some)

    def datum_mean(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Mean over datums of each datum's own mean (``datum_mean``): a scalar.

        Datums without any weight are not counted. Of a part of a batch, its share of the whole's mean.
        """
        self.check_whole("datum_mean")
        means = self.datum_means(values, weights=weights)
        if self.totals is not None:
            datums = self._which(weights, self.totals.datums, self.totals.real_datums)
            return _ratio(jnp.sum(means), datums.astype(means.dtype), datums > 0)
        _, weight = self._weighted(values, weights)
        counted = jnp.any(weight.reshape(weight.shape[0], -1) != 0, axis=1)
        return _ratio(jnp.sum(means), jnp.sum(counted.astype(means.dtype)), jnp.any(counted))

    def check_whole(self, what: str) -> None:
        """Refuse to divide by what counts where that is one device's part, unless that is meant."""
        if self.totals is None and not self.local:
            refuse_own_mean(what)

    def share(self) -> Array:
        """Which share of the whole's datums that count are in this part: 1 of a batch that is whole."""
        wide = jnp.result_type(float)
        if self.totals is None:
            return jnp.ones((), wide)
        own, whole = jnp.sum(jnp.any(self.counted, axis=1)), jnp.asarray(self.totals.datums)
        return _ratio(own.astype(wide), whole.astype(wide), whole > 0)

    def _whole(self, totals: Totals, values: Array, weights: ArrayLike | None) -> tuple[Array, Array]:
        """Σ weight of the whole batch for values of this shape, and whether anything counts there."""
        if values.ndim == 1:
            count = self._which(weights, totals.datums, totals.real_datums)
            return count.astype(values.dtype), count > 0
        weight = self._which(weights, totals.weight, totals.tokens).astype(values.dtype)
        some = self._which(weights, totals.datums, totals.tokens) > 0
        axes = self.weights.ndim if weights is None else 2
        return weight * math.prod(values.shape[axes:]), some

    def _which(self, weights: ArrayLike | None, by_weight: Array, by_mask: Array) -> Array:
        """A total under the batch's own weights, or under its mask; others are not known."""
        if weights is None:
            return jnp.asarray(by_weight)
        if weights is self.mask:
            return jnp.asarray(by_mask)
        raise ValueError(
            "this batch is a part of one, and the sum of these weights over the whole is not known: give no "
            "weights, weights=batch.mask, or take batch.reweighted(name), the batch with its weights times "
            "an array that it holds; or divide batch.sum(...) by a number that is the whole's"
        )

    def _weighted(self, values: Array, weights: ArrayLike | None) -> tuple[Array, Array]:
        """weight·value and the weight, both of the values' shape, in float32 or wider."""
        values = jnp.asarray(values)
        values = values.astype(accumulation_dtype(values.dtype))
        if weights is None:
            weight = self.weights if values.ndim > 1 else jnp.any(self.counted, axis=1)
        else:
            weight = jnp.asarray(weights)
        if values.ndim == 0 or weight.shape != values.shape[: weight.ndim]:
            raise ValueError(
                f"a reduction takes values of shape [B], [B, T] or [B, T, K] with (B, T) = "
                f"{self.shape} and weights that fit, got {values.shape} with weights {weight.shape}"
            )
        if values.ndim > 1:
            mask = self.mask.reshape(self.mask.shape + (1,) * (weight.ndim - 2))
            weight = jnp.where(mask, weight, jnp.zeros_like(weight))
        weight = weight.astype(values.dtype).reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
        weight = jnp.broadcast_to(weight, values.shape)
        return weight * jnp.where(weight != 0, values, jnp.zeros_like(values)), weight


def _ratio(numerator: Array, denominator: Array, some: Array) -> Array:
    """numerator / denominator, and 0 with a gradient of 0 where there is nothing to average.

    Weights of both signs that sum to 0 are something: their mean does not exist, and is not hidden.
    """
    safe = jnp.where(some, denominator, jnp.ones_like(denominator))
    return jnp.where(some, numerator / safe, jnp.zeros_like(numerator))
