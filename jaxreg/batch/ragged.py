"""From a rectangle to one array a datum and back, wherever a datum's tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

# A datum's number, its row, and where in it its tokens stand.
Places: TypeAlias = list[tuple[int, int, slice | np.ndarray]]


def places(own: np.ndarray, segment_ids: np.ndarray | None = None) -> Places:
    """Of a mask [B, T]: each datum that has tokens, and where they stand (a slice where they are first)."""
    if segment_ids is not None:
        return _of_segments(np.where(own, segment_ids, 0))
    sizes = own.sum(axis=1)
    first = (own == (np.arange(own.shape[1]) < sizes[:, None])).all(axis=1)
    return [
        (i, i, slice(0, int(n)) if first[i] else np.flatnonzero(own[i])) for i, n in enumerate(sizes) if n
    ]


def _of_segments(ids: np.ndarray) -> Places:
    """By datums' numbers [B, T], 0 where no token of any stands."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    numbers, begins = np.unique(flat[order], return_index=True)
    found: Places = []
    for number, tokens in zip(numbers, np.split(order, begins[1:]), strict=True):
        if number:
            found.append((int(number) - 1, int(tokens[0] // ids.shape[1]), tokens % ids.shape[1]))
    return found


def gather(array: np.ndarray, at: Places) -> list[np.ndarray]:
    """[B, T, ...] to one [T, ...] a datum, [B] to one scalar a datum."""
    return [array[i] if array.ndim == 1 else array[row, tokens] for i, row, tokens in at]


def scatter(columns: Sequence[np.ndarray], at: Places, shape: tuple[int, int], datums: int) -> np.ndarray:
    """The inverse of `gather`; 0 where no token stands.

    Raises:
      ValueError: naming the datum whose array is of another length or rank.
    """
    if len(columns) != len(at) or not columns:
        raise ValueError(f"expected one array a datum, {len(at)}; got {len(columns)}")
    scalar, inner = columns[0].ndim == 0, columns[0].shape[1:]
    dense = np.zeros((datums,) if scalar else (*shape, *inner), np.result_type(*columns))
    for datum, ((i, row, tokens), values) in enumerate(zip(at, columns, strict=True)):
        size = tokens.stop if isinstance(tokens, slice) else len(tokens)
        expected = () if scalar else (size, *inner)
        if values.shape != expected:
            raise ValueError(f"datum {datum}: expected an array of shape {expected}, got {values.shape}")
        if scalar:
            dense[i] = values
        else:
            dense[row, tokens] = values
    return dense
