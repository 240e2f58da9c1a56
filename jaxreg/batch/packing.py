"""Ragged datums to rectangular NumPy arrays, with every complaint naming the datum and the key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.arrays import array_of
from jaxreg.batch.buckets import padded
from jaxreg.batch.counting import counted, token_weights
from jaxreg.batch.segments import first_fit, packed_rows
from jaxreg.batch.values import cleaned


class Packed(NamedTuple):
    """Rectangular arrays, in the order of `TokenBatch`'s fields."""

    mask: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    arrays: dict[str, np.ndarray]
    present: np.ndarray | None


def pack_arrays(
    data: Sequence[Any], bucket_length: Callable[[int], int], bucket_rows: Callable[[int], int]
) -> Packed:
    """What the datums hold as arrays [B, T, ...] or [B], padded with zeros."""
    if isinstance(data, Mapping | str) or not isinstance(data, Sequence):
        raise TypeError(f"pack takes a sequence of datums, got {type(data).__name__}")
    if not data:
        raise ValueError("pack got no data; a batch has at least one datum")
    columns = _columns([_inputs(datum, i) for i, datum in enumerate(data)])
    sizes = _sizes(columns)
    length, rows = padded(bucket_length, max(sizes)), padded(bucket_rows, len(sizes))

    lengths = np.zeros(rows, np.int32)
    lengths[: len(sizes)] = sizes
    present = np.arange(length) < lengths[:, None]
    arrays = {name: pad(column, rows, length) for name, column in columns.items()}
    # What says whether a token counts is checked everywhere; everything else, where it counts.
    own_mask, own_weights = (
        _as_jax(cleaned(arrays.pop(name), None, name)) if name in arrays else None
        for name in ("mask", "weights")
    )
    mask = present if own_mask is None else present & _truth(own_mask, present.shape)
    weights = token_weights(own_weights, mask, np)
    for name, array in arrays.items():
        arrays[name] = _as_jax(cleaned(array, counted(mask, weights, array.shape, np), name))
    return Packed(mask, weights, lengths, arrays, None if own_mask is None else present)


def check_rows(rows: object) -> None:
    """Refuse what says nothing about rows."""
    if rows not in ("loose", "packed"):
        raise ValueError(f"rows is 'loose' (one datum each) or 'packed' (several), got {rows!r}")


def in_rows(
    loose: Any,
    bucket_rows: Callable[[int], int],
    *,
    together: int = 1,
    bucket_length: Callable[[int], int] | None = None,
) -> dict[str, Any]:
    """The fields of a batch whose rows hold several datums, of one with a row a datum.

    Args:
      loose: a batch, or what `pack_arrays` gives.
      bucket_rows: the number of rows for so many.
      together: how many datums in a row stay in one row.
      bucket_length: where a row has to hold more than the longest datum, the length for so many tokens.
    """
    lengths = np.asarray(loose.lengths)
    length, sizes = loose.mask.shape[1], lengths[lengths > 0]
    if together > 1 and bucket_length is not None:
        longest = int(np.add.reduceat(sizes, np.arange(0, len(sizes), together)).max())
        length = max(length, padded(bucket_length, longest))
    bins = first_fit(sizes, length, together)
    fields = {"mask": loose.mask, "weights": loose.weights, "present": loose.present}
    held = {name: np.asarray(array) for name, array in fields.items() if array is not None}
    names = {f"array {name}": np.asarray(array) for name, array in loose.arrays.items()}
    made, ids = packed_rows(held | names, lengths, bins, (padded(bucket_rows, bins.rows), length))
    arrays = {name: made.pop(f"array {name}") for name in loose.arrays}
    return made | {"arrays": arrays, "lengths": lengths, "segment_ids": ids, "room": len(lengths)}


def _as_jax(array: np.ndarray) -> np.ndarray:
    """In the dtype that JAX would make of it."""
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _truth(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if mask.shape != shape:
        raise ValueError("'mask' has one truth value a token: give it the shape [T]")
    return mask.astype(bool)


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
