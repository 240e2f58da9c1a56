"""What a whole batch has, as a part of it knows it: the denominators of its means.

A mean over a part that is divided by the whole's totals is the part's share of the whole's mean, so that the
parts' values and gradients add up, however unequal the parts are. A mean of the parts' own means does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array
from jaxreg.batch.segments import Segments, any_of

T = TypeVar("T")


class Weighted(NamedTuple):
    """What counts under one set of weights."""

    weight: Array  # the sum of all weights
    datums: Array  # with a token of a weight that is not 0


@flax.struct.dataclass
class Totals:
    """What a whole batch has: scalars, and leaves of each of its parts.

    Attributes:
      weight: Σ of the weights of all real tokens.
      tokens: int, the real tokens.
      datums: int, the datums with a token that counts: real, and of a weight that is not 0.
      real_datums: int, the datums with a real token.
      parts: int, into how many it was taken apart, as far as that is known; it counts where no datum does.
      reweighted: by the name of an array, weight and datums under the weights times that array.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> whole = jr.TokenBatch.from_arrays(weights=jnp.array([[0.0, 2.0], [1.0, 1.0]]))
      >>> part, _ = whole.split(2)
      >>> float(part.totals.weight), int(part.totals.datums)
      (4.0, 2)
    """

    weight: Array
    tokens: Array
    datums: Array
    real_datums: Array
    parts: Array | int = 1
    reweighted: dict[str, Weighted] = flax.struct.field(default_factory=dict)

    def counts(self) -> Array:
        """int32 [2]: the datums that count, and the real tokens."""
        return jnp.stack([jnp.asarray(self.datums), jnp.asarray(self.tokens)]).astype(jnp.int32)

    def pairs(self) -> Array:
        """How many pairs count, of a batch whose rows alternate, chosen and rejected."""
        return self.datums // 2

    def of_datums(self) -> Totals:
        """The totals of a batch with one token, of weight 1, for every datum that counts."""
        return Totals(self.datums, self.datums, self.datums, self.datums, self.parts)

    def under(self, name: str) -> Totals:
        """The totals under the weights times an array of the batch.

        Raises:
          KeyError: they were not asked for, when the whole batch was there to be summed.
        """
        if name not in self.reweighted:
            raise KeyError(
                f"this part of a batch does not know the whole's weights times {name!r}: name the array "
                f"where the whole is taken apart, split(n, reweighted=({name!r},)), or in "
                f"with_totals(axis_name=..., reweighted=...)"
            )
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            weight=self.reweighted[name].weight, datums=self.reweighted[name].datums
        )


@flax.struct.dataclass
class EqualParts:
    """The totals of a mapping's part that has neither mask nor weights: the whole is so many such parts.

    Attributes:
      count: how many.
    """

    count: Array

    def of(self, own: Totals) -> Totals:
        """The whole's totals, of the part's own."""
        whole: Totals = jax.tree.map(lambda total: total * self.count, own)
        return whole


def totals_of(
    mask: Any,
    weights: Any,
    arrays: Mapping[str, Any] | None = None,
    reweighted: Iterable[str] = (),
    segments: Segments | None = None,
) -> Totals:
    """The totals of a mask [B, ...] and weights of its shape, or [B, T, K]; NumPy's of NumPy arrays.

    The arrays that weights are multiplied by have the mask's shape, or one number a row; where rows hold
    several datums (``segments``), the mask's shape.
    """
    host = segments is None and isinstance(mask, np.ndarray) and isinstance(weights, np.ndarray)
    xp: Any = np if host else jnp

    def rows(which: Any) -> Any:
        """[B], or [N]: whether one of a datum's tokens is so."""
        return any_of(which, segments) if segments else xp.any(which.reshape(which.shape[0], -1), axis=1)

    under = {}
    for name in reweighted:
        if arrays is None or name not in arrays:
            raise KeyError(f"the batch has no array {name!r} to weight by; it has {sorted(arrays or {})}")
        factor = xp.asarray(arrays[name])
        if factor.shape not in (mask.shape, mask.shape[:1]):
            raise ValueError(
                f"{name!r} has shape {factor.shape}; what weights are multiplied by is [B, T] or [B] with "
                f"(B, T) = {mask.shape}"
            )
        factor = factor.reshape(factor.shape + (1,) * (weights.ndim - factor.ndim))
        factor = xp.where(weights != 0, factor, xp.zeros((), factor.dtype))  # whatever stands there
        under[name] = _weighted(mask, weights * factor, rows, xp)
    plain = _weighted(mask, weights, rows, xp)
    return Totals(
        weight=plain.weight,
        tokens=xp.sum(mask, dtype=np.int32),
        datums=plain.datums,
        real_datums=xp.sum(rows(mask), dtype=np.int32),
        parts=xp.ones((), np.int32),
        reweighted=under,
    )


def share_of(own: Array, whole: Array, parts: Array | int) -> Array:
    """Which share of the whole a part is: of its datums that count, or, where none does, of its real tokens.

    Args:
      own, whole: datums that count and real tokens, [2], of the part and of the whole.
      parts: how many there are, as far as that is known; it decides where there is no real token.
    """
    wide = jnp.result_type(float)
    shares = own.astype(wide) / jnp.maximum(whole, 1).astype(wide)
    alike = 1 / jnp.asarray(parts, wide)
    return jnp.where(whole[0] > 0, shares[0], jnp.where(whole[1] > 0, shares[1], alike))


def is_part(batch: Any) -> bool:
    """Whether a batch says that it is a part of one."""
    return isinstance(batch, Mapping) and isinstance(batch.get("totals"), Totals | EqualParts)


def taken_totals(arrays: dict[str, Any]) -> Totals | EqualParts | None:
    """What a mapping's copy says of the whole, taken out of it; an array of that name stays."""
    return arrays.pop("totals") if is_part(arrays) else None


def over_devices(totals: T, axis_name: Any) -> T:
    """The sum over the devices of a mesh axis, in one collective.

    Raises:
      ValueError: the axis is not bound here.
    """
    try:
        return jax.lax.psum(totals, axis_name)  # type: ignore[no-any-return]
    except NameError:
        raise ValueError(
            f"with_totals: no axis {axis_name!r} is bound here; say it inside jax.shard_map over a mesh with "
            f"that axis"
        ) from None


def refuse_less(part: Totals, whole: Totals, who: str) -> None:
    """Refuse totals that are less than the part's own counts, where numbers can be told."""
    for name in ("tokens", "datums", "real_datums"):
        own, all_of_it = getattr(part, name), getattr(whole, name)
        if isinstance(own, jax.core.Tracer) or isinstance(all_of_it, jax.core.Tracer):
            continue
        if np.ndim(all_of_it) == 0 and int(own) > int(all_of_it):
            raise ValueError(
                f"{who}: the totals are of another batch: the part has {int(own)} {name.replace('_', ' ')}, "
                f"and the whole, {int(all_of_it)}"
            )


def _weighted(mask: Any, weights: Any, rows: Any, xp: Any) -> Weighted:
    wide = jax.dtypes.canonicalize_dtype(np.float64)  # as wide as any reduction divides in
    real = mask.reshape(mask.shape + (1,) * (weights.ndim - mask.ndim))
    held = xp.where(real, weights, xp.zeros((), weights.dtype))
    total = xp.sum(held, dtype=np.float64 if xp is np else wide).astype(wide)
    return Weighted(total, xp.sum(rows(held != 0), dtype=np.int32))
