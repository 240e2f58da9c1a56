"""What a pass over the terms takes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxreg.base.types import Array, Place, PyTree
from jaxreg.batch.segments import Segments
from jaxreg.core.norms import GradNorms

Forward: TypeAlias = Callable[[PyTree], tuple[PyTree, PyTree]]  # from params to outputs, and aux


class BoundTerm(NamedTuple):
    """A term that is a function of the differentiated value alone."""

    fn: Callable[[PyTree], tuple[Array, Any]]
    weight: Array | None  # None for the base loss, which has none
    on_params: bool
    whose: str = "term"  # what errors call it


class Norms(NamedTuple):
    """What is measured of the terms, in their order; None for a term that has no gradient in this space."""

    terms: list[Array | None]
    per_datum: list[Array | None]
    absolutes: list[tuple[Array, Array] | None]  # the largest magnitude, and the mean
    total: Array
    gramian: Array | None = None  # of those that have a gradient in this space


class Combined(NamedTuple):
    """What an aggregator made of a Gramian."""

    coefficients: Array  # [M], of the weighted gradients
    metrics: dict[str, Array]
    state: PyTree
    gramian: Array  # [M, M]


class Combine(NamedTuple):
    """An aggregator, and whose Gramian it gets."""

    space: Place
    solve: Callable[[Array], Combined]


class Held(NamedTuple):
    """What was measured last, where it is measured now and then."""

    fresh: Array  # bool: whether this step measures
    norms: Norms | None
    combined: Combined | None  # of an aggregator whose Gramian is measured now and then, too


class Ask(NamedTuple):
    """What a pass is to find besides the gradient."""

    norms: GradNorms | None = None
    space: Place = "outputs"  # of the norms
    combine: Combine | None = None
    held: Held | None = None
    segments: Segments | None = None  # whose each token is, for norms a datum of rows that hold several

    def combines(self, space: Place) -> bool:
        """Whether an aggregator gets the Gramian of this space."""
        return self.combine is not None and self.combine.space == space

    @property
    def in_params(self) -> bool:
        """Whether every term's gradient is pulled back to the params."""
        return self.combines("params") or (self.norms is not None and self.space == "params")


class Pass(NamedTuple):
    """What one pass gives: the total, every term's value and extras; if asked, gradient, norms and so on."""

    total: Array
    values: list[Array]
    extras: list[Any]
    aux: PyTree  # what the model returned beside its outputs
    gradient: PyTree = None
    norms: Norms | None = None
    combined: Combined | None = None


def members(on_params: Sequence[bool], space: Place) -> list[int]:
    """Which terms have a gradient in a space: on params all, on outputs those that are not on params."""
    return [i for i, params in enumerate(on_params) if space == "params" or not params]


def weighted(weight: Array | None, value: Array) -> Array:
    """``weight · value`` of a scalar, and 0 at weight 0, though the value be NaN or infinite.

    It is the value that is replaced, so that d/d(weight) stays the value, at weight 0 too.
    """
    if weight is None:
        return value
    scale = weight.astype(value.dtype)
    return scale * jnp.where((scale == 0) & ~jnp.isfinite(value), jnp.zeros_like(value), value)


def total_of(terms: Sequence[BoundTerm], values: Sequence[Array]) -> Array:
    """``base + Σ weightᵢ·valueᵢ``."""
    total = values[0]
    for term, value in zip(terms[1:], values[1:], strict=True):
        total = total + weighted(term.weight, value)
    return total
