"""What an aggregator is: a Gramian in, coefficients out.

The rows of a Gramian belong to the *weighted* gradients of the terms, the base loss first, so a term's weight
is its preference. An aggregator is a frozen dataclass and a pytree: its numbers are leaves, and changing one
compiles nothing; its choices (`wrt`, `nonfinite`, modes) are static.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.pytrees import registered_dataclass
from jaxreg.base.types import Array, PyTree

T = TypeVar("T")


class Combination(NamedTuple):
    """What an aggregator gives: the coefficients [K] of the weighted gradients, its own numbers (scalars by
    name), and what it carries to the next step, or None.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.aggregation.Sum().solve(jnp.eye(2)).coefficients.tolist()
      [1.0, 1.0]
    """

    coefficients: Array
    metrics: dict[str, Array]
    state: PyTree = None


def static(*, default: Any) -> Any:
    """A field that is a choice and no number."""
    return dataclasses.field(default=default, metadata={"static": True})


@typing.dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def registered(kind: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree of its numbers."""
    return registered_dataclass(dataclasses.dataclass(frozen=True)(kind))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregator:
    """The base of all aggregators.

    Args:
      wrt: whose gradients an objective combines with it: ``"outputs"``, with one pullback of the model;
        ``"params"``, by the exact Gramian in parameter space, with one pullback a term. **None** is
        ``"outputs"``.
      nonfinite: what becomes of a Gramian with NaN or ∞ in it. ``"propagate"``: all coefficients are NaN, as
        a plain sum would be. ``"drop"``: the plain sum of the gradients that are finite. ``"raise"``: a
        `FloatingPointError` where the numbers are at hand, and ``"propagate"`` where JAX traces.

    Attributes:
      needs_key: whether ``key=`` has to be given.
      stateful: whether it carries something from step to step.
      non_conflicting: whether the combination has no negative inner product with any of the gradients.
      linear: whether the combination of gradients that are all scaled is scaled alike.
      asymmetric: whether the first gradient, the base loss's, has a part of its own.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> aggregator = jr.aggregation.UPGrad(nonfinite="drop")
      >>> aggregator.non_conflicting, aggregator(jnp.diag(jnp.array([1.0, jnp.nan]))).tolist()
      (True, [1.0, 0.0])
    """

    wrt: Literal["outputs", "params"] | None = static(default=None)
    nonfinite: Literal["propagate", "drop", "raise"] = static(default="propagate")

    needs_key: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    non_conflicting: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    asymmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        who = type(self).__name__
        one_of(who, "wrt", self.wrt, (None, "outputs", "params"))
        one_of(who, "nonfinite", self.nonfinite, ("propagate", "drop", "raise"))
        self._check()

    def __call__(self, gramian: Array, *, key: Array | None = None, state: PyTree = None) -> Array:
        """The coefficients [K] of a Gramian [K, K].

        Raises:
          FloatingPointError: it is not finite, and ``nonfinite="raise"``.
        """
        found = self.solve(gramian, key=key, state=state).coefficients
        if self.nonfinite == "raise" and not isinstance(found, jax.core.Tracer):
            rows = np.flatnonzero(_not_finite(jnp.asarray(gramian)))
            if rows.size:
                raise FloatingPointError(
                    f"{type(self).__name__}: rows {rows.tolist()} of the Gramian are not finite; "
                    f"nonfinite='drop' takes the plain sum of the others"
                )
        return found

    def solve(self, gramian: Array, *, key: Array | None = None, state: PyTree = None) -> Combination:
        """The coefficients, with the aggregator's own numbers and its next state.

        Args:
          gramian: [K, K], symmetric, float32 or float64.
          key: a random key, of those with ``needs_key``.
          state: ``init(K)`` or the last ``Combination.state``, of those that are ``stateful``; without it, as
            in the first step.
        """
        gramian = self._checked(gramian, key)
        if self.stateful and state is None:
            state = self.init(gramian.shape[0])
        bad = _not_finite(gramian)
        clean = jnp.where(bad[:, None] | bad[None, :], 0, gramian)
        found = self._combine(clean, key, state)
        any_bad = jnp.any(bad)
        instead = jnp.where(bad, 0, 1) if self.nonfinite == "drop" else jnp.nan
        coefficients = jnp.where(any_bad, instead, found.coefficients).astype(gramian.dtype)
        following = jax.tree.map(lambda last, new: jnp.where(any_bad, last, new), state, found.state)
        return Combination(coefficients, found.metrics, following)

    def init(self, count: int) -> PyTree:
        """The first state for so many gradients; None where nothing is carried."""
        return None

    def _combine(self, gramian: Array, key: Array | None, state: PyTree) -> Combination:
        """The same for a Gramian that is finite."""
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse numbers that are out of range."""

    def _checked(self, gramian: Array, key: Array | None) -> Array:
        who = type(self).__name__
        gramian = jnp.asarray(gramian)
        if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.shape[0]:
            raise ValueError(
                f"{who}: a Gramian is [K, K], got shape {gramian.shape}; for several at once use jax.vmap"
            )
        if not jnp.issubdtype(gramian.dtype, jnp.floating):
            raise TypeError(f"{who}: a Gramian is of real floating-point numbers, got {gramian.dtype}")
        if self.needs_key and key is None:
            raise ValueError(f"{who}: it draws at random: pass key=jax.random.key(seed)")
        return gramian.astype(jnp.promote_types(gramian.dtype, jnp.float32))


def _not_finite(gramian: Array) -> Array:
    """Whose gradients are not finite, [K]; a NaN is in every row, and on the diagonal of its own."""
    bad = ~jnp.isfinite(jnp.diagonal(gramian))
    among = ~(bad[:, None] | bad[None, :])
    return bad | jnp.any(among & ~jnp.isfinite(gramian), axis=1)  # inner products that overflowed


def one_of(who: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise ValueError(f"{who}: {name} is {' or '.join(map(repr, choices))}, got {value!r}")


def in_range(who: str, name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number that is out of range. What is no number yet (a tracer) passes."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic):
        if isinstance(value, str | bool | type(None)):
            raise TypeError(f"{who}: {name} is a number, got {value!r}")
        return
    value = float(value)
    if not (low < value if open_low else low <= value) or not value <= high:
        sign = "<" if open_low else "≤"
        bound = f"{low:g} {sign} {name}" + (f" ≤ {high:g}" if np.isfinite(high) else "")
        raise ValueError(f"{who}: {bound}, got {value:g}")
