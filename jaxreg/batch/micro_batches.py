"""Any batch of rows, cut into micro-batches for a scan: a `TokenBatch`, or a mapping of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.splitting import cut, repeated, rows_a_part
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import EqualParts, Totals, over_devices, taken_totals, totals_of


def micro_batches(
    batch: PyTree, n: int, *, rows_together: int = 1, reweighted: Iterable[str] = (), axis_name: Any = None
) -> PyTree:
    """The batch as n parts, every array of which is [n, B', ...], with the totals of the whole.

    Args:
      batch: a `TokenBatch`, or a mapping of arrays [B, ...]. One without ``mask`` and ``weights``, in which
        every row counts alike, has to have a multiple of n rows.
      n: how many.
      rows_together: how many rows in a row stay in one part.
      reweighted: names of arrays that terms multiply the weights by.
      axis_name: the mesh axis whose devices have the other rows of the whole.

    Raises:
      TypeError: a batch of another kind. ValueError: rows that cannot be cut so.
    """
    if isinstance(batch, TokenBatch):
        if axis_name is not None and batch.totals is None:
            batch = batch.with_totals(axis_name=axis_name, reweighted=reweighted)
        if batch.segments is None and batch.pairs is not None and rows_together % 2:
            rows_together *= 2
        return batch.stacked_parts(n, rows_together=rows_together, reweighted=reweighted)
    if not isinstance(batch, Mapping) or not batch:
        raise TypeError(
            f"accumulate takes a TokenBatch, or a mapping from name to array whose first axis is the rows; "
            f"got {type(batch).__name__}"
        )
    arrays = dict(batch)
    given = taken_totals(arrays)
    if (named := list(reweighted)) and given is None and not arrays.keys() & {"mask", "weights"}:
        raise ValueError(
            f"accumulate: a term multiplies weights by {named[0]!r}, and the batch has neither 'mask' nor "
            f"'weights': give it a mask, of the real tokens"
        )
    rows = _rows(arrays)
    each = rows_a_part(rows, n, rows_together, "accumulate")
    totals = _totals(arrays, reweighted, axis_name) if given is None else given
    if isinstance(totals, EqualParts):
        if n * each != rows:
            raise ValueError(
                f"accumulate: {n} steps do not divide {rows} rows, and the batch has neither 'mask' nor "
                f"'weights' to say which rows are filled up: give it one, or another number of steps"
            )
        totals = EqualParts(jnp.asarray(totals.count * n))
    else:
        totals = totals.replace(parts=totals.parts * n)  # type: ignore[attr-defined]
    parts: dict[str, Any] = cut(arrays, rows, n, each, "accumulate")
    return parts | {"totals": repeated(totals, n)}


def seen(part: PyTree) -> tuple[Array, Array]:
    """Datums that count and real tokens, [2], of a part, and of the whole; or 1 and the number of parts."""
    totals = part["totals"]
    if isinstance(totals, EqualParts):
        return jnp.ones(2, jnp.int32), jnp.full(2, totals.count, jnp.int32)
    own = part.own_totals() if isinstance(part, TokenBatch) else _own(part)
    return own.counts(), totals.counts()


def _rows(arrays: Mapping[str, Any]) -> int:
    leaves = jax.tree.leaves(arrays)
    if not leaves or np.ndim(leaves[0]) == 0:
        raise ValueError("accumulate: the batch's arrays have their rows on the first axis")
    return int(leaves[0].shape[0])


def _totals(arrays: Mapping[str, Any], reweighted: Iterable[str], axis_name: Any) -> Totals | EqualParts:
    if "mask" in arrays or "weights" in arrays:
        own = _own(arrays, reweighted)
        return own if axis_name is None else over_devices(own, axis_name)
    count = 1 if axis_name is None else over_devices(jnp.ones((), jnp.int32), axis_name)
    return EqualParts(jnp.asarray(count, jnp.int32))


def _own(arrays: Mapping[str, Any], reweighted: Iterable[str] = ()) -> Totals:
    weights = jnp.asarray(arrays["weights"]) if "weights" in arrays else None
    mask = jnp.asarray(arrays["mask"] if "mask" in arrays else np.ones(weights.shape[:2], bool), bool)  # type: ignore[union-attr]
    return totals_of(mask, mask.astype(jnp.float32) if weights is None else weights, arrays, reweighted)
