"""Token data as arrays that every term can read: rectangular, masked and bucketed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array, ArrayLike
from jaxreg.batch.packing import next_length, next_rows, pack_arrays

Buckets: TypeAlias = Sequence[int] | Callable[[int], int]


@flax.struct.dataclass(eq=False)
class TokenBatch(Mapping[str, Array]):
    """A batch of B datums of up to T tokens: a pytree, and a mapping from name to array.

    Attributes:
      mask: bool [B, T], the real tokens. A padded row is masked whole.
      weights: [B, T] or [B, T, K], how much each token counts: the data's own ``weights``, or the
        mask. Always 0 where the mask is False.
      lengths: int [B], tokens of each datum; 0 for a padded row.
      arrays: every other array by its name: [B, T], [B, T, K], or [B] for a scalar a datum.

    Make one with `pack` (ragged data) or `from_arrays` (rectangular arrays).

    The reductions count each token with ``weights``, or with the ``weights=`` given to them
    (``weights=batch.mask`` for every real token alike). They take [B] (one number a datum), [B, T],
    or [B, T, K], accumulate in float32, ignore whatever stands where the weight is 0, be it NaN, and
    send exactly no gradient there. With no weight at all they give 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.pack([
      ...     {"logprobs": [-1.0, -2.0, -3.0], "weights": [0.0, 1.0, 1.0], "reward": 1.0},
      ...     {"logprobs": [-4.0], "weights": [1.0], "reward": 0.5},
      ... ])
      >>> batch.mask.shape, batch["reward"].tolist()
      ((4, 128), [1.0, 0.5, 0.0, 0.0])
      >>> batch.mean(batch["logprobs"]).item(), batch.datum_mean(batch["logprobs"]).item()
      (-3.0, -3.25)
      >>> batch.unpack(batch["logprobs"])
      [array([-1., -2., -3.], dtype=float32), array([-4.], dtype=float32)]
    """

    mask: Array
    weights: Array
    lengths: Array
    arrays: dict[str, Array] = flax.struct.field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        data: Sequence[Any],
        *,
        length_buckets: Buckets = next_length,
        row_buckets: Buckets = next_rows,
    ) -> TokenBatch:
        """Pack ragged datums into one padded, masked batch of NumPy arrays.

        Args:
          data: mappings from name to an array of shape [T] or [T, K] or a scalar (T may differ from
            datum to datum), or objects with such a mapping as ``loss_fn_inputs``, like the Tinker
            API's datums. Two names have a meaning: ``weights`` ([T] or [T, K], a token's weight) and
            ``mask`` ([T], False takes a token out of everything).
          length_buckets: sizes that T is padded to (increasing), or a function from the longest
            length to the padded one. Default: powers of two from 128.
          row_buckets: the same for B. Default: powers of four from 4, always even, so that pairs stay
            pairs.

        Returns:
          A `TokenBatch`. Every size that is not seen before compiles a program; the default buckets
          make at most 12 of them up to 64 datums of 1024 tokens.

        Raises:
          ValueError, TypeError: no data, a datum without tokens, arrays of unequal length within a
            datum, a key that is missing somewhere, NaN, an array that is not numeric: with the
            datum and the key.
        """
        arrays, lengths, mask = pack_arrays(
            data, _bucket(length_buckets, "length"), _bucket(row_buckets, "row")
        )
        weights = _token_weights(arrays.pop("weights", None), mask, np)
        # NumPy arrays: whoever calls the compiled program decides where they go.
        return cls(*cast(Any, (mask, weights, lengths, arrays)))

    @classmethod
    def from_arrays(
        cls, *, mask: ArrayLike | None = None, weights: ArrayLike | None = None, **arrays: ArrayLike
    ) -> TokenBatch:
        """Make a batch of arrays that are rectangular already; works inside jit.

        Args:
          mask: bool [B, T], the real tokens; all by default. A row that is masked whole is padding,
            and `unpack` leaves it out.
          weights: [B, T] or [B, T, K]; the mask by default.
          **arrays: [B, T, ...] or [B] by name.

        Example:
          >>> import jax.numpy as jnp, jaxreg as jr
          >>> batch = jr.TokenBatch.from_arrays(tokens=jnp.zeros((2, 3), int))
          >>> batch.mask.shape, list(batch)
          ((2, 3), ['tokens'])
        """
        given = {name: jnp.asarray(array) for name, array in arrays.items()}
        shapes = [jnp.shape(a)[:2] for a in (mask, weights) if a is not None]
        shapes += [a.shape[:2] for a in given.values() if a.ndim > 1]
        if not shapes:
            raise ValueError("TokenBatch.from_arrays needs an array of shape [B, T, ...]")
        shape = shapes[0]
        bad = {n: a.shape for n, a in given.items() if a.ndim == 0 or a.shape[:2] != shape[: a.ndim]}
        if len(shape) != 2 or bad or any(s != shape for s in shapes):
            raise ValueError(
                f"TokenBatch.from_arrays: all arrays are [B, T, ...] or [B] with one B and T; "
                f"got { ({n: a.shape for n, a in given.items()}) }, mask "
                f"{None if mask is None else jnp.shape(mask)}, weights "
                f"{None if weights is None else jnp.shape(weights)}"
            )
        real = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
        lengths = jnp.max(jnp.where(real, jnp.arange(1, shape[1] + 1, dtype=jnp.int32), 0), axis=1)
        held = None if weights is None else jnp.asarray(weights)
        return cls(real, _token_weights(held, real, jnp), lengths, given)

    def __getitem__(self, name: str) -> Array:
        if name not in self.arrays:
            hint = f"; say batch.{name}" if name in ("mask", "weights", "lengths") else ""
            raise KeyError(f"the batch has no array {name!r}{hint}; it has {sorted(self.arrays)}")
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __bool__(self) -> bool:
        return True  # with a mask alone, too

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), padding included."""
        rows, length = self.mask.shape
        return rows, length

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
        """Σ weight·value / Σ weight over all tokens (``token_mean``): a scalar."""
        weighted, weight = self._weighted(values, weights)
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

        Datums without any weight are not counted.
        """
        _, weight = self._weighted(values, weights)
        counted = jnp.any(weight.reshape(weight.shape[0], -1) != 0, axis=1)
        means = self.datum_means(values, weights=weights)
        return _ratio(jnp.sum(means), jnp.sum(counted.astype(means.dtype)), jnp.any(counted))

    def unpack(self, array: ArrayLike) -> list[np.ndarray]:
        """Back to one NumPy array a datum, without padding: [B, T, ...] -> [T, ...], [B] -> scalar.

        Raises:
          ValueError: the array's leading axes are not this batch's.
        """
        lengths, host = np.asarray(self.lengths), np.asarray(array)
        if host.ndim == 0 or host.shape[:2] != self.shape[: host.ndim]:
            raise ValueError(
                f"unpack takes an array of shape [B, T, ...] or [B] with (B, T) = {self.shape}, got "
                f"{host.shape}"
            )
        rows = [(i, n) for i, n in enumerate(lengths) if n]
        return [host[i, :n] if host.ndim > 1 else host[i] for i, n in rows]

    def _weighted(self, values: Array, weights: ArrayLike | None) -> tuple[Array, Array]:
        """weight·value and the weight, both of the values' shape, in float32 or wider."""
        values = jnp.asarray(values)
        values = values.astype(accumulation_dtype(values.dtype))
        if weights is None:
            weight = self.weights if values.ndim > 1 else jnp.any(self.mask, axis=1)
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


def _token_weights(weights: Any, mask: Any, xp: Any) -> Any:
    if weights is None:
        return mask.astype(np.float32)
    if xp.ndim(weights) not in (2, 3) or xp.shape(weights)[:2] != mask.shape:
        raise ValueError(
            f"'weights' has one number a token ([T], or [T, K]): expected [B, T] or [B, T, K] with "
            f"(B, T) = {mask.shape}, got {xp.shape(weights)}"
        )
    real = mask if xp.ndim(weights) == 2 else mask[..., None]
    if not xp.issubdtype(weights.dtype, xp.floating):
        weights = weights.astype(np.float32)
    return xp.where(real, weights, xp.zeros((), weights.dtype))


def _bucket(buckets: Buckets, what: str) -> Callable[[int], int]:
    if callable(buckets):
        return buckets
    if not isinstance(buckets, Sequence) or not buckets:
        raise TypeError(f"{what}_buckets is a sequence of sizes or a function, got {buckets!r}")
    sizes = sorted(buckets)

    def next_size(n: int) -> int:
        for size in sizes:
            if size >= n:
                return size
        raise ValueError(f"{n} does not fit into the largest {what} bucket, {sizes[-1]}")

    return next_size


def as_token_batch(batch: Any, like: Any, who: str) -> TokenBatch:
    """The batch itself, or one made of a plain mapping, whose tokens then are all real."""
    if not isinstance(like, jax.Array | np.ndarray):
        fields = f" with the fields {sorted(map(str, like))}" if isinstance(like, Mapping) else ""
        raise TypeError(f"{who}: expected an array [B, T, ...], got {type(like).__name__}{fields}")
    if isinstance(batch, TokenBatch):
        return batch
    if batch is None or isinstance(batch, Mapping):
        if jnp.ndim(like) < 2:
            raise ValueError(f"{who}: expected token data of shape [B, T, ...], got {jnp.shape(like)}")
        given = dict(batch or {})
        mask = given.pop("mask", None)
        if mask is None:
            mask = jnp.ones(jnp.shape(like)[:2], bool)
        return TokenBatch.from_arrays(mask=mask, **given)
    raise TypeError(
        f"{who}: it reads a TokenBatch or a mapping from name to array, got {type(batch).__name__}"
    )
