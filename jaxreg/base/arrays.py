"""From whatever holds numbers to NumPy, without importing what made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def to_numpy(value: Any) -> np.ndarray:
    """A dense array of an SDK's tensor (sparse ones too, without torch), a torch tensor, a list, ..."""
    if type(value) is np.ndarray:
        return value
    if hasattr(value, "to_numpy"):  # the SDK's; its sparse ones would need torch for this
        rows = getattr(value, "sparse_crow_indices", None)
        return _dense(value, rows) if rows is not None else np.asarray(value.to_numpy())
    if callable(getattr(value, "detach", None)):
        tensor = value.detach().cpu()  # torch's; NumPy has no bfloat16
        return np.asarray((tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy())
    if hasattr(value, "data") and hasattr(value, "shape") and isinstance(value.data, list):
        array = np.asarray(value.data)
        return array if value.shape is None else array.reshape(value.shape)
    return np.asarray(value)


def array_of(value: Any, name: str, i: int) -> np.ndarray:
    """`to_numpy`, of one key of datum i.

    Raises:
      TypeError: it is no array of numbers; it names the datum and the key.
    """
    try:
        return to_numpy(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"datum {i}, {name!r}: not an array of numbers ({error})") from None


def _dense(value: Any, rows: Sequence[int]) -> np.ndarray:
    numbers = np.asarray(value.data)
    dense = np.zeros(value.shape, numbers.dtype)
    counts = np.diff(np.asarray(rows))
    dense[np.repeat(np.arange(len(counts)), counts), np.asarray(value.sparse_col_indices)] = numbers
    return dense
