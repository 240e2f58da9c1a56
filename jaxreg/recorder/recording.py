"""A step's inputs as a tree of plain values and arrays, and back: what a flight recording holds.

Dicts, lists, tuples, `TokenBatch` and arrays come back as they were. Of any other pytree the leaves are
kept; it comes back with ``like=``, a pytree of the same structure. Nothing in a file is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import Totals, Weighted

_PLAIN = (str, int, float, bool, type(None))
# No NumPy types: kept as the bits that they are.
_SMALL = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}


NUMBERS = ("weight", "tokens", "datums", "real_datums", "parts")  # of totals


class Lost(ValueError):
    """A part of a recording that could not be kept, or put together again."""


def to_plain(tree: PyTree) -> Any:
    """What can be encoded. A deleted array (donated to a jitted function) is marked as lost."""
    if isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, TokenBatch):
        fields: dict[str, Any] = {"mask": tree.mask, "weights": tree.weights, "lengths": tree.lengths}
        optional = {name: getattr(tree, name) for name in ("present", "pairs", "segment_ids")}
        fields |= {name: array for name, array in optional.items() if array is not None}
        if tree.totals is not None:
            fields["totals"] = _plain_totals(tree.totals)
        return {"token_batch": {k: to_plain(v) for k, v in (fields | {"arrays": tree.arrays}).items()}}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: to_plain(value) for key, value in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [to_plain(value) for value in tree]}
    if isinstance(tree, jax.Array | np.ndarray | np.generic):
        return _array(tree)
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return {"lost": f"no array, but {type(tree).__name__}"}
    return {"leaves": [to_plain(leaf) for leaf in leaves], "type": type(tree).__qualname__}


def from_plain(plain: Any, where: str, like: PyTree = None) -> PyTree:
    """What `to_plain` was given.

    Args:
      plain: what it made, or what a stranger made to look so.
      where: what this is, for the errors.
      like: a pytree whose structure is that of a pytree of which the leaves alone were kept.

    Raises:
      Lost: it cannot be put together; it says why.
    """
    if isinstance(plain, (*_PLAIN, np.ndarray)):
        return plain
    kind, held = _only(plain, where)
    if kind == "dict" and isinstance(held, Mapping):
        inner = like if isinstance(like, Mapping) else {}
        return {key: from_plain(value, f"{where}/{key}", inner.get(key)) for key, value in held.items()}
    if kind in ("list", "tuple") and isinstance(held, list):
        inner_like = like if isinstance(like, list | tuple) and len(like) == len(held) else [None] * len(held)
        items = [from_plain(v, f"{where}/{i}", inner_like[i]) for i, v in enumerate(held)]
        return items if kind == "list" else tuple(items)
    if kind == "token_batch" and isinstance(held, Mapping):
        return _token_batch({k: from_plain(v, f"{where}/{k}") for k, v in held.items()}, where)
    if kind == "leaves" and isinstance(held, list):
        return _pytree([from_plain(v, where) for v in held], plain.get("type"), like, where)
    if kind == "lost":
        raise Lost(f"{where} was not kept: {held}")
    if kind in ("bits", "key"):
        return _special(kind, plain, where)
    raise Lost(f"{where} is of a kind that is not known: {kind!r}")


def _plain_totals(totals: Totals) -> dict[str, Any]:
    plain = {name: getattr(totals, name) for name in NUMBERS}
    return plain | {"reweighted": {name: list(own) for name, own in totals.reweighted.items()}}


def _totals(plain: Any) -> Totals:
    """What `_plain_totals` made; KeyError, TypeError or ValueError of what a stranger made."""
    plain = dict(plain)
    reweighted = {str(name): Weighted(*own) for name, own in dict(plain.pop("reweighted")).items()}
    numbers = {name: plain[name] for name in NUMBERS}
    if any(np.ndim(leaf) for leaf in jax.tree.leaves((numbers, reweighted))):
        raise ValueError("totals are scalars")
    return Totals(**numbers, reweighted=reweighted)


def _array(array: Any) -> Any:
    if isinstance(array, jax.Array) and array.is_deleted():
        return {"lost": "its array was donated to a jitted function; record with copy=True"}
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return {"key": np.asarray(jax.random.key_data(array)), "impl": str(jax.random.key_impl(array))}
    name, host = str(array.dtype), np.asarray(array)
    if name in _SMALL:
        return {"bits": host.view(_SMALL[name]), "dtype": name}
    return host


def _only(plain: Any, where: str) -> tuple[str, Any]:
    if not isinstance(plain, Mapping) or not plain:
        raise Lost(f"{where} is no part of a recording")
    return next(iter(plain.items()))


def _token_batch(fields: dict[str, Any], where: str) -> TokenBatch:
    try:
        mask, weights, lengths, arrays = (fields[k] for k in ("mask", "weights", "lengths", "arrays"))
        ids = fields.get("segment_ids")
        good = mask.ndim == 2 and weights.shape[:2] == mask.shape and lengths.ndim == 1
        good = good and (lengths.shape == mask.shape[:1] if ids is None else ids.shape == mask.shape)
        good = good and (ids is None or (ids.dtype.kind in "iu" and bool((ids <= len(lengths)).all())))
        good = good and mask.dtype == bool and lengths.dtype.kind in "iu" and isinstance(arrays, dict)
        lead = {1: lengths.shape}
        good = good and all(a.ndim and a.shape[:2] == lead.get(a.ndim, mask.shape) for a in arrays.values())
        good = good and bool(((lengths >= 0) & (lengths <= mask.shape[1])).all())
        present, pairs = fields.get("present"), fields.get("pairs")
        good = good and (present is None or (present.shape == mask.shape and present.dtype == bool))
        good = good and (pairs is None or (pairs.shape == lengths.shape and pairs.dtype.kind in "iu"))
        totals = None if fields.get("totals") is None else _totals(fields["totals"])
    except (KeyError, AttributeError, TypeError, ValueError):
        good = False
    if not good:
        raise Lost(f"{where} is no TokenBatch: its arrays do not fit together")
    return TokenBatch(
        mask=mask,
        weights=weights,
        lengths=lengths,
        arrays=arrays,
        present=present,
        pairs=pairs,
        segment_ids=ids,
        totals=totals,
    )


def _pytree(leaves: list[Any], name: object, like: PyTree, where: str) -> PyTree:
    structure: Any = jax.tree.structure(like)
    if like is None or structure.num_leaves != len(leaves):
        raise Lost(
            f"{where} was a pytree of the type {name} with {len(leaves)} leaves, which alone were kept: give "
            f"one of the same structure (like=)"
        )
    for kept, there in zip(leaves, jax.tree.leaves(like), strict=True):
        if np.shape(kept) != np.shape(there):
            raise Lost(f"{where}: a leaf has shape {np.shape(kept)}, but in like= {np.shape(there)}")
    return jax.tree.unflatten(structure, leaves)


def _special(kind: str, plain: Mapping[str, Any], where: str) -> Any:
    array = plain[kind]
    try:
        if kind == "bits":
            name = plain["dtype"]
            if array.dtype != _SMALL[name]:
                raise ValueError(f"{array.dtype} for {name}")
            return np.asarray(array).view(jnp.dtype(name))
        return jax.random.wrap_key_data(jnp.asarray(array), impl=plain["impl"])
    except Exception as error:
        raise Lost(f"{where} is no array of the kind that it says: {error}") from None
