"""How a host function sees a batch of arrays: one mapping a datum, without padding."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxreg.base.types import PyTree
from jaxreg.batch.token_batch import TokenBatch


class Row(dict[str, Any]):
    """One datum's arrays by name: [T], [T, K] or a scalar.

    A remote client hands a host function the API's own datums, which keep their arrays in
    ``loss_fn_inputs``; so does a row, so that one function reads both.

    Example:
      >>> import jaxreg as jr
      >>> row = jr.host.Row(reward=1.0)
      >>> row["reward"], row.loss_fn_inputs["reward"]
      (1.0, 1.0)
    """

    @property
    def loss_fn_inputs(self) -> Row:
        """The row itself."""
        return self


def as_data(batch: PyTree) -> Any:
    """A `TokenBatch` as one `Row` a datum, of its tokens; any other pytree as it is, with NumPy arrays."""
    if not isinstance(batch, TokenBatch):
        return jax.tree.map(np.asarray, batch)
    columns = {name: batch.unpack(array) for name, array in batch.arrays.items()}
    columns["mask"], columns["weights"] = batch.unpack(batch.mask), batch.unpack(batch.weights)
    return [Row(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def is_by_datum(x: PyTree, batch: PyTree) -> bool:
    """Whether x is read as one array a datum: token data beside a `TokenBatch`."""
    return isinstance(batch, TokenBatch) and np.ndim(x) > 1 and np.shape(x)[:2] == batch.shape


def as_values(x: PyTree, batch: PyTree, by_datum: bool) -> Any:
    """What is differentiated: one array a datum, or its pytree of arrays."""
    x = jax.tree.map(_readable, x)
    return batch.unpack(x) if by_datum else x


def as_gradient(gradient: Any, x: PyTree, batch: PyTree, by_datum: bool) -> PyTree:
    """A gradient shaped as `as_values` gave it, shaped as x; zero where the mask is False."""
    if not by_datum:
        return jax.tree.map(lambda slope, like: np.asarray(slope, like.dtype), gradient, x)
    if not gradient:
        return np.zeros(x.shape, x.dtype)
    masks = batch.unpack(batch.mask)
    slopes = [masked(slope, mask) for slope, mask in zip(gradient, masks, strict=True)]
    return batch.repack(slopes).astype(x.dtype)


def masked(slope: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A datum's gradient [T, ...] where its mask [T] is True; a masked token is out of everything."""
    return np.where(mask.reshape(mask.shape + (1,) * (slope.ndim - 1)), slope, np.float32(0))


def _readable(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array if array.dtype.kind in "fiub" else array.astype(np.float32)  # bfloat16 is no NumPy type
