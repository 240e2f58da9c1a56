"""How values of tokens become one number, or one a datum, by what counts."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array, ArrayLike
from jaxreg.batch.counting import counted
from jaxreg.batch.segments import Segments, any_of, largest_of, spread, summed
from jaxreg.batch.shards import refuse_own_mean
from jaxreg.batch.totals import Totals, share_of


class Reductions:
    """The reductions of a `TokenBatch`, by its mask [B, T] and weights [B, T] or [B, T, K]."""

    mask: Array
    weights: Array
    lengths: Array
    segment_ids: Array | None  # whose each token is, where a row may hold several datums
    totals: Totals | None  # the whole's, where this is a part
    room: int | None  # how many datums' numbers those are, where it is known
    local: bool  # whether means of one device's own tokens are meant, inside shard_map

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), padding included."""
        rows, length = self.mask.shape
        return rows, length

    @property
    def datums(self) -> int:
        """For how many datums there is room: B, or, where a row may hold several, N."""
        return int(self.lengths.shape[0])

    @property
    def segments(self) -> Segments | None:
        """Which token is whose, where a row may hold several datums."""
        if self.segment_ids is None:
            return None
        if self.room not in (None, self.datums):
            raise ValueError(
                f"the rows hold several of {self.room} datums, by their numbers in segment_ids, but what is "
                f"of datums was cut to [{self.datums}]: it belongs to all rows, so inside shard_map every "
                f"device has all of it, by in_specs=jax.tree.map(lambda a: P('data') if a.ndim > 1 else P(), "
                f"batch)"
            )
        return Segments(jnp.asarray(self.segment_ids), self.datums)

    @property
    def datums_counted(self) -> Array:
        """bool [B] (or [N]), the datums with a token that counts; any other is as if it were not there."""
        return self.any_by_datum(self.counted)

    def any_by_datum(self, which: Array) -> Array:
        """Whether something [B, T, ...] is so at one of a datum's tokens: bool [B], or [N]."""
        return any_of(jnp.asarray(which), self.segments)

    def sum_by_datum(self, values: Array) -> Array:
        """The plain sum of values [B, T, ...] over a datum's tokens, whatever counts: [B], or [N]."""
        return summed(values, self.segments)

    def largest_by_datum(self, values: Array) -> Array:
        """The largest of values [B, T, ...] ≥ 0 over a datum's tokens: [B], or [N]."""
        return largest_of(values, self.segments)

    def spread(self, values: Array) -> Array:
        """One number a datum, [B] or [N], at each of its tokens: [B, T].

        Example:
          >>> import jaxreg as jr
          >>> data = [{"x": [1.0, 2.0], "reward": 5.0}, {"x": [3.0], "reward": 7.0}]
          >>> batch = jr.TokenBatch.pack(data, rows="packed", length_buckets=[4])
          >>> batch.spread(batch["reward"])[0].tolist()
          [5.0, 5.0, 7.0, 0.0]
        """
        return spread(jnp.asarray(values), self.segments, self.shape[1])

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
        """Σ weight·value over each datum's tokens: [B], or, of rows that hold several datums, [N]."""
        weighted, _ = self._weighted(values, weights)
        return self.sum_by_datum(weighted)

    def datum_means(self, values: Array, *, weights: ArrayLike | None = None) -> Array:
        """Each datum's own weighted mean: [B], 0 where a datum has no weight."""
        weighted, weight = self._weighted(values, weights)
        some = self.any_by_datum(weight != 0)
        return _ratio(self.sum_by_datum(weighted), self.sum_by_datum(weight), some)

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
        counted = self.any_by_datum(weight != 0)
        return _ratio(jnp.sum(means), jnp.sum(counted.astype(means.dtype)), jnp.any(counted))

    def check_whole(self, what: str) -> None:
        """Refuse to divide by what counts where that is one device's part, unless that is meant."""
        if self.totals is None and not self.local:
            refuse_own_mean(what)

    def share(self) -> Array:
        """Which share of the whole's datums that count are in this part: 1 of a batch that is whole."""
        if self.totals is None:
            return jnp.ones((), jnp.result_type(float))
        own = jnp.stack([jnp.sum(self.datums_counted), jnp.sum(jnp.asarray(self.mask, jnp.int32))])
        return share_of(own, self.totals.counts(), self.totals.parts)

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
            weight = self.weights if values.ndim > 1 else self.datums_counted
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
