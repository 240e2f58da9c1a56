"""What the terms that remember share: another term inside, whose arguments they pass on, and a decaying mean.

The state of a step stays as it is while the step is computed, in however many parts, and moves once, by what
the whole batch gave: `remember` is called with the whole's value and metrics.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.core.spec import check_term, requested_arguments


class _Signature:
    """What asks a wrapper for its arguments is told those of the term inside, and its own."""

    def __get__(self, made: Wrapper | None, kind: type) -> inspect.Signature | None:
        if made is None:
            return None
        asked = dict.fromkeys((*requested_arguments(made.term), "state", *made.asks))
        plain = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("x", "batch")]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in asked]
        return inspect.Signature([*plain, *more])


class Wrapper:
    """A term around another one. What that says of itself (``additive``, ``rows_together``) it says, too."""

    term: Any
    asks: tuple[str, ...] = ()  # what it wants to be given beside the state
    __signature__ = _Signature()

    def _inside(self, x: PyTree, batch: PyTree, asked: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
        """The inner term's value and metrics."""
        wanted = requested_arguments(self.term)
        result = self.term(x, batch, **{name: value for name, value in asked.items() if name in wanted})
        value, metrics = result if isinstance(result, tuple) else (result, {})
        return value, dict(metrics)

    def _check(self) -> None:
        who = type(self).__name__
        check_term(self.term, f"{who}: the term inside")
        if "state" in requested_arguments(self.term):
            raise ValueError(
                f"{who}: the term inside, {type(self.term).__name__}, carries a state of its own, and a "
                f"term has one"
            )

    def __getattr__(self, name: str) -> Any:
        """What it says of itself is what the term inside says."""
        if name.startswith("__") or name in ("term", "asks"):
            raise AttributeError(name)
        return getattr(self.term, name)


def with_array(batch: PyTree, name: str, array: Array) -> PyTree:
    """The batch with one more array, or another one of the name: a `TokenBatch`, a mapping, or None."""
    if hasattr(batch, "with_arrays"):
        return batch.with_arrays(**{name: array})
    return {**(batch or {}), name: array}


def nothing_yet(*names: str) -> dict[str, Array]:
    """A decaying mean of several numbers, of none so far."""
    return {name: jnp.zeros((), jnp.result_type(float)) for name in (*names, "weight")}


def moved(state: dict[str, Array], decay: float, **new: Array) -> dict[str, Array]:
    """One step further; numbers that are not finite are not remembered."""
    good = jnp.all(jnp.stack([jnp.isfinite(value) for value in new.values()]))
    following = {name: decay * state[name] + (1 - decay) * value for name, value in new.items()}
    following["weight"] = decay * state["weight"] + (1 - decay)
    return {
        name: jnp.where(good, value, state[name]).astype(state[name].dtype)
        for name, value in following.items()
    }


def mean_of(state: dict[str, Array], name: str) -> Array:
    """The mean so far, each step by its own weight (Kingma & Ba 2015 divide so); 0 before the first."""
    weight = state["weight"]
    return jnp.where(weight > 0, state[name] / jnp.where(weight > 0, weight, 1), 0)


def check_decay(decay: Any, who: str) -> None:
    """Refuse what is no share that stays from step to step."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise ValueError(f"{who}: decay is within 0 … 1 (1 itself left out), got {decay!r}")


def fixed(tree: PyTree) -> PyTree:
    """The tree, without a gradient."""
    return jax.lax.stop_gradient(tree)
