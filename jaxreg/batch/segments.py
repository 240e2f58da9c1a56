"""Rows that hold several datums: which token is whose, and what is reduced a datum.

``segment_ids`` [B, T] are the datums' numbers, 1 … N, and 0 where no datum stands. A datum stands in one row,
without another between its tokens. What is of datums has the shape [N] then, and not [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array


class Segments(NamedTuple):
    """Which token is whose."""

    ids: Array  # [B, T]
    number: int  # N


def summed(values: Array, segments: Segments | None) -> Array:
    """The sum over each datum's tokens of values [B, T, ...] (and over all later axes): [B], or [N]; values
    of datums [B] or [N] as they are."""
    if values.ndim == 1:
        return values
    if segments is None:
        return jnp.sum(values.reshape(values.shape[0], -1), axis=1)
    each = values.reshape(segments.ids.size, -1)
    each = each[:, 0] if each.shape[1] == 1 else jnp.sum(each, axis=1)
    total = jax.ops.segment_sum(each, jnp.ravel(segments.ids), num_segments=segments.number + 1)
    return total[1:]


def any_of(which: Array, segments: Segments | None) -> Array:
    """Whether something is so at one of a datum's tokens: bool [B], or [N]."""
    if which.ndim == 1:
        return which
    if segments is None:
        return jnp.any(which.reshape(which.shape[0], -1), axis=1)
    return summed(which.astype(jnp.int32), segments) > 0


def largest_of(values: Array, segments: Segments | None) -> Array:
    """The largest of values [B, T, ...] ≥ 0 among each datum's tokens: [B], or [N]."""
    if segments is None:
        return jnp.max(values.reshape(values.shape[0], -1), axis=1)
    each = jnp.max(values.reshape(segments.ids.size, -1), axis=1)
    found = jax.ops.segment_max(each, jnp.ravel(segments.ids), num_segments=segments.number + 1)
    return jnp.maximum(found[1:], 0)  # of no token it is −∞


def spread(values: Array, segments: Segments | None, length: int) -> Array:
    """One number a datum, [B] or [N], at each of its tokens: [B, T]; 0 where no datum stands."""
    if segments is None:
        return jnp.broadcast_to(values[:, None], (values.shape[0], length))
    there = segments.ids > 0
    return jnp.where(there, values[jnp.where(there, segments.ids - 1, 0)], jnp.zeros((), values.dtype))


def starts(segments: Segments | None, shape: tuple[int, int]) -> Array:
    """[B, T]: where in its row the datum of each token begins."""
    at = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if segments is None:
        return jnp.zeros(shape, at.dtype)
    before = jnp.pad(segments.ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segments.ids != before, at, 0), axis=1)


def loose(values: Array, segments: Segments) -> Array:
    """Values [B, T, ...] as [N, T, ...], a row a datum, its tokens first; for what is quadratic in a row."""
    rows, length = segments.ids.shape
    flat = jnp.ravel(segments.ids)
    first = starts(segments, (rows, length))
    at = jnp.arange(length)[None, :] - first
    to = jnp.where(flat > 0, (flat - 1) * length + jnp.ravel(at), segments.number * length)
    held = jnp.zeros((segments.number * length + 1, *values.shape[2:]), values.dtype)
    held = held.at[to].set(values.reshape(rows * length, *values.shape[2:]))
    return held[:-1].reshape(segments.number, length, *values.shape[2:])


def check_segments(ids: Any, who: str) -> int:
    """The largest number, of ids that are known; and each datum stands in one row, in one piece.

    Raises:
      TypeError, ValueError: they are no whole numbers ≥ 0 of shape [B, T], or a datum is in pieces.
    """
    host = np.asarray(ids)
    if host.dtype.kind not in "iu" or host.ndim != 2:
        raise TypeError(
            f"{who}: segment_ids are whole numbers [B, T], got {host.dtype} of shape {host.shape}"
        )
    if host.size and host.min() < 0:
        raise ValueError(
            f"{who}: segment_ids are datums' numbers from 1 on, and 0 for none; got {host.min()}"
        )
    begins = host.copy()
    begins[:, 1:][host[:, 1:] == host[:, :-1]] = 0
    numbers, times = np.unique(begins[begins > 0], return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"{who}: segment {numbers[times > 1][0]} is not contiguous: its tokens stand in one row, with no "
            f"other segment between them"
        )
    return int(host.max(initial=0))


class Bins(NamedTuple):
    """Where the datums of a packed batch stand."""

    row: np.ndarray  # [N]
    start: np.ndarray  # [N]
    rows: int


def first_fit(sizes: np.ndarray, length: int, together: int = 1) -> Bins:
    """Each group of ``together`` datums into the first row that has room for it."""
    row, start = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    free: list[int] = []
    for i in range(0, len(sizes), together):
        group = sizes[i : i + together]
        need = int(group.sum())
        at = next((r for r, room in enumerate(free) if room >= need), len(free))
        if at == len(free):
            free.append(length)
        begin = length - free[at] + np.concatenate([[0], np.cumsum(group)[:-1]])
        row[i : i + together], start[i : i + together] = at, begin
        free[at] -= need
    return Bins(row, start, len(free))


def packed_rows(
    loose_arrays: Mapping[str, np.ndarray], lengths: np.ndarray, bins: Bins, shape: tuple[int, int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays [N, L, ...] as [B, T, ...], and the segment ids; arrays [N] as they are."""
    ids = np.zeros(shape, np.int32)
    made = {
        name: np.zeros((*shape, *array.shape[2:]), array.dtype) if array.ndim > 1 else array
        for name, array in loose_arrays.items()
    }
    for i, size in enumerate(lengths):
        if size:
            here = slice(int(bins.start[i]), int(bins.start[i] + size))
            ids[bins.row[i], here] = i + 1
            for name, array in loose_arrays.items():
                if array.ndim > 1:
                    made[name][bins.row[i], here] = array[i, :size]
    return made, ids
