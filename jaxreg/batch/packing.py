"""Ragged datums to rectangular NumPy arrays, with every complaint naming the datum and the key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.arrays import array_of

SHORTEST, FEWEST_ROWS = 128, 4


def next_length(n: int) -> int:
    """The smallest power of two ≥ n, and ≥ 128."""
    return max(SHORTEST, 1 << (n - 1).bit_length())


def next_rows(n: int) -> int:
    """The smallest power of four ≥ n, and ≥ 4: few programs, and always even."""
    rows = FEWEST_ROWS
    while rows < n:
        rows *= 4
    return rows


def pack_arrays(
    data: Sequence[Any], bucket_length: Callable[[int], int], bucket_rows: Callable[[int], int]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Arrays by name [B, T, ...] or [B], lengths [B] and mask [B, T], padded with zeros."""
    if isinstance(data, Mapping | str) or not isinstance(data, Sequence):
        raise TypeError(f"pack takes a sequence of datums, got {type(data).__name__}")
    if not data:
        raise ValueError("pack got no data; a batch has at least one datum")
    columns = _columns([_inputs(datum, i) for i, datum in enumerate(data)])
    sizes = _sizes(columns)
    length, rows = _padded(bucket_length, max(sizes)), _padded(bucket_rows, len(sizes))

    lengths = np.zeros(rows, np.int32)
    lengths[: len(sizes)] = sizes
    mask = np.arange(length) < lengths[:, None]
    arrays = {}
    for name, column in columns.items():
        array = pad(column, rows, length)
        _check_values(array, column, name)
        arrays[name] = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    if "mask" in arrays:
        if arrays["mask"].shape != mask.shape:
            raise ValueError("'mask' has one truth value a token: give it the shape [T]")
        mask &= arrays.pop("mask").astype(bool)
    return arrays, lengths, mask


def pad(column: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """One array a datum to [rows, length, ...], or one scalar a datum to [rows], padded with zeros."""
    dtype = functools.reduce(jnp.promote_types, {values.dtype for values in column})
    if column[0].ndim == 0:
        array = np.zeros(rows, dtype)
        array[: len(column)] = column
        return array
    array = np.zeros((rows, length, *column[0].shape[1:]), dtype)
    for row, values in zip(array, column, strict=False):
        row[: len(values)] = values
    return array


# What follows looks at whole columns, one key of all datums, and at single datums only to name the culprit.


def _inputs(datum: Any, i: int) -> Mapping[str, Any]:
    inputs = getattr(datum, "loss_fn_inputs", datum)
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"datum {i}: expected a mapping from name to array, or an object with loss_fn_inputs; "
            f"got {type(datum).__name__}"
        )
    if not inputs:
        raise ValueError(f"datum {i} has no arrays")
    return inputs


def _columns(rows: list[Mapping[str, Any]]) -> dict[str, list[np.ndarray]]:
    """The datums' arrays by key, alike in rank, in K, and in being numbers."""
    names = rows[0].keys()
    if any(row.keys() != names for row in rows):
        _complain_of_keys(rows)
    columns = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"datum 0: a key is a string, got {name!r}")
        column = [array_of(row[name], name, i) for i, row in enumerate(rows)]
        for dtype in {array.dtype for array in column}:
            # bfloat16 is of kind "V", as is whatever else NumPy does not know.
            if dtype.kind not in "fiub" and not jnp.issubdtype(dtype, jnp.floating):
                i = next(i for i, array in enumerate(column) if array.dtype == dtype)
                raise TypeError(f"datum {i}, {name!r}: not an array of real numbers (dtype {dtype})")
        if len({(array.ndim, array.shape[1:]) for array in column}) > 1 or column[0].ndim > 2:
            _complain_of_shapes(column, name)
        columns[name] = column
    return columns


def _sizes(columns: Mapping[str, list[np.ndarray]]) -> list[int]:
    """The number of tokens of every datum, which all its arrays agree on."""
    sizes = {name: [len(a) for a in column] for name, column in columns.items() if column[0].ndim}
    if not sizes:
        raise ValueError("datum 0 has scalars only; at least one array has a number a token")
    first = next(iter(sizes.values()))
    for i, size in enumerate(first):
        if not size:
            raise ValueError(f"datum {i} has no tokens; leave it out")
    if any(other != first for other in sizes.values()):
        i = next(i for i in range(len(first)) if len({other[i] for other in sizes.values()}) > 1)
        lengths = {name: other[i] for name, other in sizes.items()}
        raise ValueError(f"datum {i}: its arrays differ in length: {lengths}")
    return first


def _check_values(padded: np.ndarray, column: Sequence[np.ndarray], name: str) -> None:
    """Look at all numbers of a key at once, and for the datum only where something is wrong."""
    if jnp.issubdtype(padded.dtype, jnp.floating):
        numbers = padded if padded.dtype.kind == "f" else padded.astype(np.float32)
        if np.isnan(numbers).any():
            i, *at = np.argwhere(np.isnan(numbers))[0].tolist()
            raise ValueError(f"datum {i}, {name!r}: NaN at {at if at else 'its only value'}")
        if name.endswith("logprobs") and numbers.max() > 1e-3:
            i = next(i for i, values in enumerate(column) if values.size and values.max() > 1e-3)
            raise ValueError(
                f"datum {i}, {name!r}: logprobs are ≤ 0, but it holds {float(column[i].max()):.4g}; if these "
                f"are probabilities, take their logarithm"
            )
    elif padded.dtype.kind in "iu":
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(padded.dtype))
        outside = (padded < limits.min) | (padded > limits.max)
        if outside.any():
            i = np.argwhere(outside)[0][0]
            raise ValueError(
                f"datum {i}, {name!r}: holds integers outside of {limits.dtype}, the widest JAX has now"
            )


def _complain_of_keys(rows: list[Mapping[str, Any]]) -> None:
    holder = {name: i for i, row in reversed(list(enumerate(rows))) for name in row}
    for i, row in enumerate(rows):
        missing = [name for name in holder if name not in row]
        if missing:
            raise ValueError(
                f"datum {i} has no {missing[0]!r}, which datum {holder[missing[0]]} has; every datum "
                f"of a batch has the same keys (datum {i} has {sorted(map(str, row))})"
            )


def _complain_of_shapes(column: list[np.ndarray], name: str) -> None:
    first = column[0]
    for i, array in enumerate(column):
        if array.ndim > 2:
            raise ValueError(
                f"datum {i}, {name!r}: has shape {array.shape}; expected [T], [T, K] or a scalar"
            )
        if array.ndim != first.ndim or array.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"datum {i}, {name!r}: has shape {array.shape} where datum 0 has {first.shape}; only "
                f"the first axis, tokens, may differ"
            )


def _padded(bucket: Callable[[int], int], n: int) -> int:
    size = bucket(n)
    if size < n:
        raise ValueError(f"a bucket of {size} does not hold {n}")
    return size
