"""A batch as people see it: how many datums and tokens, and what each array is of."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxreg.base.shown import readable, span

FIELDS = ("mask", "weights", "lengths", "present", "pairs", "segment_ids")


def batch_title(batch: Any) -> str:
    """How many datums and tokens are real, and how many count, where there are numbers to tell."""
    mask, weights = readable(batch.mask), readable(batch.weights)
    if mask is None or weights is None or mask.ndim != 2:
        return "TokenBatch"
    real = mask.astype(bool)
    counts = real & (weights.reshape(*real.shape, -1) != 0).any(axis=-1)
    datums, tokens = _datums(batch, real), int(real.sum())
    some = f", of which {int(counts.sum())} count" if counts.sum() != tokens else ""
    rows, length = real.shape
    part = "" if batch.totals is None else _part(batch.totals)
    return (
        f"TokenBatch of {_many(datums, 'datum')}, {_many(tokens, 'token')}{some}, padded to {rows} × "
        f"{length}{part}"
    )


def _datums(batch: Any, real: np.ndarray) -> int:
    """How many datums have a real token."""
    if batch.segment_ids is None:
        return int(real.any(axis=1).sum())
    return int((np.unique(np.asarray(batch.segment_ids)[real]) > 0).sum())


def _part(totals: Any) -> str:
    """What it is a part of, where that can be told."""
    datums = readable(totals.real_datums)
    return "" if datums is None or datums.ndim else f"; a part of {_many(int(datums), 'datum')}"


def batch_rows(batch: Any) -> list[list[str]]:
    """One row an array: its name, dtype, shape, and between which numbers it lies where tokens are real."""
    real = readable(batch.mask)
    fields = {name: getattr(batch, name) for name in FIELDS if getattr(batch, name) is not None}
    rows = [_row(name, array, None) for name, array in fields.items()]
    rows += [_row(name, array, real) for name, array in batch.arrays.items()]
    return [["array", "dtype", "shape", "lowest … highest"], *rows]


def _row(name: str, array: Any, real: np.ndarray | None) -> list[str]:
    numbers = readable(array)
    if numbers is not None and real is not None and numbers.shape[:2] == real.shape[: numbers.ndim]:
        numbers = numbers[real if numbers.ndim > 1 else real.any(axis=1)]
    dtype, shape = getattr(array, "dtype", type(array).__name__), list(getattr(array, "shape", ()))
    return [name, str(dtype), str(shape), "" if numbers is None else span(numbers)]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
