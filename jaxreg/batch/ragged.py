"""From a rectangle to one array a datum and back, wherever a datum's tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Places: TypeAlias = list[tuple[int, slice | np.ndarray]]


def places(own: np.ndarray) -> Places:
    """Of a mask [B, T]: each row that has tokens, and where they stand (a slice where they are first)."""
    sizes = own.sum(axis=1)
    first = (own == (np.arange(own.shape[1]) < sizes[:, None])).all(axis=1)
    return [(i, slice(0, int(n)) if first[i] else np.flatnonzero(own[i])) for i, n in enumerate(sizes) if n]


def gather(array: np.ndarray, at: Places) -> list[np.ndarray]:
    """[B, T, ...] to one [T, ...] a datum, [B] to one scalar a datum."""
    return [array[i] if array.ndim == 1 else array[i, tokens] for i, tokens in at]


def scatter(columns: Sequence[np.ndarray], at: Places, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `gather`; 0 where no token stands.

    Raises:
      ValueError: naming the datum whose array is of another length or rank.
    """
    if len(columns) != len(at) or not columns:
        raise ValueError(f"expected one array a datum, {len(at)}; got {len(columns)}")
    scalar, inner = columns[0].ndim == 0, columns[0].shape[1:]
    dense = np.zeros(shape[:1] if scalar else (*shape, *inner), np.result_type(*columns))
    for datum, ((i, tokens), values) in enumerate(zip(at, columns, strict=True)):
        size = tokens.stop if isinstance(tokens, slice) else len(tokens)
        expected = () if scalar else (size, *inner)
        if values.shape != expected:
            raise ValueError(f"datum {datum}: expected an array of shape {expected}, got {values.shape}")
        if scalar:
            dense[i] = values
        else:
            dense[i, tokens] = values
    return dense
