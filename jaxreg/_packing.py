"""Ragged datums to rectangular NumPy arrays, with every complaint naming the datum and the key."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    datums = [_read(datum, i) for i, datum in enumerate(data)]
    _check_keys(datums)
    sizes = [_length(datum, i) for i, datum in enumerate(datums)]
    length, rows = _padded(bucket_length, max(sizes)), _padded(bucket_rows, len(datums))

    lengths = np.zeros(rows, np.int32)
    lengths[: len(sizes)] = sizes
    mask = np.arange(length) < lengths[:, None]
    arrays = {}
    for name in datums[0]:
        column = [datum[name] for datum in datums]
        _check_alike(column, name)
        arrays[name] = pad(column, rows, length)
    if "mask" in arrays:
        if arrays["mask"].shape != mask.shape:
            raise ValueError("'mask' has one truth value a token: give it the shape [T]")
        mask &= arrays.pop("mask").astype(bool)
    return arrays, lengths, mask


def pad(column: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """One array a datum to [rows, length, ...], or one scalar a datum to [rows], padded with zeros."""
    shape = (rows,) if column[0].ndim == 0 else (rows, length, *column[0].shape[1:])
    array = np.zeros(shape, functools.reduce(jnp.promote_types, {values.dtype for values in column}))
    for i, values in enumerate(column):
        array[(i, slice(len(values))) if values.ndim else i] = values
    return array


def _read(datum: Any, i: int) -> dict[str, np.ndarray]:
    """One datum's arrays, checked one by one."""
    inputs = getattr(datum, "loss_fn_inputs", datum)
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"datum {i}: expected a mapping from name to array, or an object with loss_fn_inputs; "
            f"got {type(datum).__name__}"
        )
    if not inputs:
        raise ValueError(f"datum {i} has no arrays")
    return {_key(name, i): _array(value, name, i) for name, value in inputs.items()}


def _key(name: Any, i: int) -> str:
    if not isinstance(name, str):
        raise TypeError(f"datum {i}: a key is a string, got {name!r}")
    return name


def _array(value: Any, name: str, i: int) -> np.ndarray:
    where = f"datum {i}, {name!r}"
    to_numpy = getattr(value, "to_numpy", None)
    try:
        array = np.asarray(to_numpy() if callable(to_numpy) else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: not an array of numbers ({error})") from None
    is_float = jnp.issubdtype(array.dtype, jnp.floating)  # bfloat16 too
    if not (is_float or array.dtype.kind in "iub"):
        raise TypeError(f"{where}: not an array of real numbers (dtype {array.dtype})")
    if array.ndim > 2:
        raise ValueError(f"{where}: has shape {array.shape}; expected [T], [T, K] or a scalar")
    if is_float and np.isnan(array.astype(np.float64, copy=False)).any():
        at = np.argwhere(np.isnan(array.astype(np.float64, copy=False)))[0].tolist()
        raise ValueError(f"{where}: NaN at {at if at else 'its only value'}")
    if is_float and name.endswith("logprobs") and array.size and array.max() > 1e-3:
        raise ValueError(
            f"{where}: logprobs are ≤ 0, but it holds {float(array.max()):.4g}; if these are probabilities, "
            f"take their logarithm"
        )
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"{where}: holds integers outside of {dtype}, the widest JAX has now")
    return array.astype(dtype, copy=False)


def _check_keys(datums: list[dict[str, np.ndarray]]) -> None:
    holder = {name: i for i, datum in reversed(list(enumerate(datums))) for name in datum}
    for i, datum in enumerate(datums):
        missing = [name for name in holder if name not in datum]
        if missing:
            raise ValueError(
                f"datum {i} has no {missing[0]!r}, which datum {holder[missing[0]]} has; every datum "
                f"of a batch has the same keys (datum {i} has {sorted(datum)})"
            )


def _length(datum: dict[str, np.ndarray], i: int) -> int:
    lengths = {name: len(array) for name, array in datum.items() if array.ndim}
    if not lengths:
        raise ValueError(f"datum {i} has scalars only; at least one array has a number a token")
    if len(set(lengths.values())) != 1:
        raise ValueError(f"datum {i}: its arrays differ in length: {lengths}")
    length = next(iter(lengths.values()))
    if not length:
        raise ValueError(f"datum {i} has no tokens; leave it out")
    return length


def _check_alike(column: list[np.ndarray], name: str) -> None:
    """All datums' arrays of one name agree in rank, and in K."""
    first = column[0]
    for i, array in enumerate(column):
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
