"""What the built-in terms share: how they are declared, and where their references come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.kinds import Kinds
from jaxreg.base.pytrees import register_fields
from jaxreg.base.shown import fields_of
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import BY_FIELD, TokenBatch
from jaxreg.batch.values import refuse_positive
from jaxreg.terms.masked import real_values

# What a term reads beside x: an array of the batch by its name, an array, or a function of the batch.
Source: TypeAlias = str | jax.typing.ArrayLike | Callable[[Any], Any]
_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def term(cls: _Class) -> _Class:
    """A frozen, keyword-only dataclass that is a pytree, and equal to another if all arguments are.

    Fields that a `Source` or parameters may stand in (``reference``, ``sampler``, ...) are children of
    the pytree, so arrays in them are arguments of the compiled program; all other fields are static.

    Where a class says nothing else, its value and metrics add up over the parts of a batch (``additive``,
    ``metric_kinds``), or, of a term on parameters, are the same in each.
    """
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    names = [field.name for field in dataclasses.fields(made)]
    data = [name for name in names if name in HOLD_ARRAYS]
    made.__eq__ = _equal
    made.__hash__ = _hash
    made.__repr__ = fields_of
    # Over the parts of a batch, where the term says nothing else: what is of parameters is the same in each.
    of_params = getattr(made, "place", None) == "params"
    for name, plain in (("additive", True), ("metric_kinds", Kinds("sum"))):
        if not hasattr(made, name):
            setattr(made, name, ("same" if name == "additive" else Kinds("same")) if of_params else plain)
    register_fields(made, data, [name for name in names if name not in data])
    return cast(_Class, made)


# The fields that are children.
HOLD_ARRAYS = (
    *("reference", "fisher", "candidates", "sampler", "advantages"),
    *("prior_mean", "prior_log_var"),
)


def _values(term: Any) -> list[Any]:
    return [getattr(term, field.name) for field in dataclasses.fields(term)]


def _equal(self: Any, other: object) -> bool:
    if self is other:
        return True
    if type(self) is not type(other):
        return False
    (mine, my_tree), (theirs, their_tree) = (jax.tree.flatten(_values(t)) for t in (self, other))
    return bool(cast(Any, my_tree) == their_tree) and all(map(_same, mine, theirs))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    if _is_array(a) and _is_array(b):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _hash(self: Any) -> int:
    leaves, _ = jax.tree.flatten(_values(self))
    return hash(
        (type(self), *((leaf.shape, str(leaf.dtype)) if _is_array(leaf) else leaf for leaf in leaves))
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def read(source: Source, batch: TokenBatch, who: str, what: str) -> Array:
    """The array that a source stands for, without a gradient.

    Raises:
      KeyError: the batch has no array of this name; it lists those that there are.
    """
    if isinstance(source, str):
        if source not in batch:
            raise KeyError(
                f"{who}: the batch has no array {source!r} ({what}); it has {sorted(batch.arrays)}"
            )
        array: Any = batch[source]
    else:
        array = source(batch) if callable(source) else source
    try:
        return jax.lax.stop_gradient(jnp.asarray(array))
    except (TypeError, ValueError):
        raise TypeError(
            f"{who}: {what} is a name in the batch, an array, or a function of the batch that gives an "
            f"array; got {type(array).__name__}"
        ) from None


def named(source: Source, what: str) -> str:
    """What a source is, and its name in the batch where it has one."""
    return f"{what}, {source!r}," if isinstance(source, str) else what


def read_like(
    source: Source,
    batch: TokenBatch,
    shape: tuple[int, ...],
    who: str,
    what: str,
    *,
    per_datum: bool = False,
    logprobs: bool = False,
) -> Array:
    """`read`, of a given shape, masked and in float32; per_datum, [B] stands for every token of its datum.

    Of logprobs a positive one is refused, where numbers can be told.
    """
    array = read(source, batch, who, what)
    if per_datum and array.ndim == 1 and batch.segments is not None and array.shape == (batch.datums,):
        array = batch.spread(array)
        array = jnp.broadcast_to(array.reshape(*array.shape, *[1] * (len(shape) - 2)), shape)
    elif per_datum and array.shape == shape[:1]:
        array = jnp.broadcast_to(array.reshape(-1, *[1] * (len(shape) - 1)), shape)
    if array.shape != shape:
        raise ValueError(f"{who}: {named(source, what)} has shape {array.shape}, but x has {shape}")
    values = real_values(batch, array, who)
    if logprobs:
        refuse_positive(values, who, what)
    return values


def needs(x: PyTree, ndim: int, who: str, what: str) -> Array:
    """x, if it is an array of so many axes.

    Raises:
      ValueError: it has another number of axes. TypeError: it is no array.
    """
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{who}: expected {what}, got {type(x).__name__}; {BY_FIELD}")
    if x.ndim != ndim:
        raise ValueError(f"{who}: expected {what}, got shape {x.shape}")
    return jnp.asarray(x)
