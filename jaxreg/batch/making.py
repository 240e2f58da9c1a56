"""The fields of a `TokenBatch`, of arrays that are rectangular already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, ArrayLike
from jaxreg.batch.counting import token_weights
from jaxreg.batch.segments import Segments, check_segments, summed
from jaxreg.batch.values import refuse_probabilities


def of_arrays(
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    segment_ids: ArrayLike | None,
    datums: int | None,
    arrays: Mapping[str, ArrayLike],
    who: str,
) -> dict[str, Any]:
    """The fields, of arrays that all have to fit together.

    Raises:
      ValueError: one does not; it says which.
    """
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    shapes = [jnp.shape(a)[:2] for a in (mask, weights, segment_ids) if a is not None]
    shapes += [a.shape[:2] for a in given.values() if a.ndim > 1]
    if not shapes:
        raise ValueError(f"{who} needs an array of shape [B, T, ...]")
    shape = shapes[0]
    count = None if segment_ids is None else _datums(segment_ids, datums, given, who)
    if len(shape) != 2 or misfits(given, shape, count) or any(s != shape for s in shapes):
        of_datums = "[B]" if count is None else f"[N] = ({count},)"
        raise ValueError(
            f"{who}: {_odd_one(given, shape, count)}all arrays are [B, T, ...] or {of_datums} with one B and "
            f"T; got { ({n: a.shape for n, a in given.items()}) }, mask "
            f"{None if mask is None else jnp.shape(mask)}, weights "
            f"{None if weights is None else jnp.shape(weights)}"
        )
    return made(mask, weights, segment_ids, count, given, shape, who)


def made(
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    segment_ids: ArrayLike | None,
    datums: int | None,
    given: dict[str, Array],
    shape: tuple[int, ...],
    who: str,
) -> dict[str, Any]:
    """The fields. An array that does not fit is the complaint of who reads it, not of who first looks."""
    real = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask, bool)
    segments = None
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids, jnp.int32)
        segments = Segments(ids, _datums(segment_ids, datums, given, who))
        real = real & (ids > 0) & (ids <= segments.number)
    held = token_weights(None if weights is None else jnp.asarray(weights), real)
    odd = misfits(given, shape, None if segments is None else segments.number)
    fitting = {n: a for n, a in given.items() if n not in odd and (a.ndim > 1 or segments is None)}
    refuse_probabilities(fitting, real, held, who)
    fields = {
        "mask": real,
        "weights": held,
        "arrays": given,
        "lengths": summed(real.astype(jnp.int32), segments),
    }
    return fields if segments is None else fields | {"segment_ids": segments.ids, "room": segments.number}


def misfits(
    arrays: Mapping[str, Array], shape: tuple[int, ...], datums: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes that are neither [B, T, ...] nor one number a datum."""
    of_datums = shape[:1] if datums is None else (datums,)
    return {
        name: array.shape
        for name, array in arrays.items()
        if array.ndim == 0 or array.shape[:2] != (of_datums if array.ndim == 1 else shape)
    }


def _datums(segment_ids: ArrayLike, datums: int | None, given: Mapping[str, Array], who: str) -> int:
    """For how many datums there is room."""
    known = not isinstance(segment_ids, jax.core.Tracer)
    most = check_segments(segment_ids, who) if known else None
    sizes = {name: array.shape[0] for name, array in given.items() if array.ndim == 1}
    count = datums if datums is not None else next(iter(sizes.values()), most)
    if count is None:
        raise ValueError(
            f"{who}: segment_ids are traced, so they do not tell for how many datums there is room: say "
            f"datums="
        )
    if most is not None and most > count:
        raise ValueError(f"{who}: segment_ids go up to {most}, but there is room for {count} datums")
    return count


def _odd_one(given: Mapping[str, Array], shape: tuple[int, ...], datums: int | None) -> str:
    """Which array does not go with which."""
    others = {name: array.shape for name, array in given.items() if array.shape[:2] == shape}
    like = next(iter(others.items()), ("mask", shape))
    return "".join(
        f"{name!r} has shape {odd}, but {like[0]!r} {like[1]}: "
        for name, odd in misfits(given, shape, datums).items()
    )
