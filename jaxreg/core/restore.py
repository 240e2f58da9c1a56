"""A state that was saved, for an objective that may have changed since."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.paths import leaf_paths
from jaxreg.base.types import PyTree
from jaxreg.core.state import VERSION


class StateChangedWarning(UserWarning):
    """A saved state is of an objective that had other terms."""


def restored(first: PyTree, saved: PyTree) -> PyTree:
    """The saved state, in the structure of a first one; what is new begins anew, what is gone is left out.

    Args:
      first: the objective's first state.
      saved: one that was saved: as it was, or as the plain dicts and arrays that a checkpoint gives.

    Raises:
      ValueError, TypeError: it is of another objective; it says what differs.

    Warns:
      StateChangedWarning: naming the terms that were added, and those that are gone.
    """
    own, theirs = (flax.serialization.to_state_dict(state) for state in (first, saved))
    if not isinstance(theirs, Mapping):
        raise TypeError(
            f"restored takes a state that was saved, a dict of arrays, got {type(saved).__name__}"
        )
    _check_version(theirs)
    for name in ("terms", "weights"):
        if name in theirs and not isinstance(theirs[name], Mapping):
            raise ValueError(
                f"the saved state is of something else: its {name!r} is no dict by the terms' names, but "
                f"{type(theirs[name]).__name__}"
            )
    if theirs and "step" in own and "step" not in theirs:
        raise ValueError(
            f"the saved state is cut, or of something else: it has {sorted(theirs)} and no 'step', which "
            f"every state has"
        )
    step = theirs.get("step", 0)
    if not isinstance(step, Mapping) and np.ndim(step) == 0 and step < 0:
        raise ValueError(f"the saved state is of something else: its step is {step}")
    unknown = sorted(theirs.keys() - _KNOWN)
    if unknown:
        raise ValueError(
            f"the saved state is of something else: it has {unknown}, which no objective's state has"
        )
    told: list[str] = []
    merged = dict(own)
    for name, here in own.items():
        if name == "version":
            continue
        if name not in theirs:
            told.append(f"{_WHAT.get(name, name)} begins anew, for it was not saved")
        elif name in ("terms", "weights"):
            merged[name] = _by_name(name, here, theirs[name], told)
        elif (what := difference(here, theirs[name])) is None:
            merged[name] = theirs[name]
        elif name == "step":
            raise ValueError(f"the saved state is of something else: its step {what}")
        else:
            told.append(f"{_WHAT.get(name, name)} begins anew, for it {what}")
    told += [
        f"{_WHAT.get(name, name)} is needed no more" for name in theirs.keys() - own.keys() - {"version"}
    ]
    if told:
        warnings.warn("the saved state: " + "; ".join(told), StateChangedWarning, stacklevel=3)
    whole = flax.serialization.from_state_dict(first, merged)
    return jax.tree.map(_as_saved, first, whole)


_KNOWN = {"version", "step", "terms", "weights", "rules", "norms", "norms_age", "aggregator"}
_WHAT = {
    "terms": "what terms remember",
    "weights": "what a rule chose",
    "rules": "what the rules remember",
    "norms": "what norms were measured last",
    "norms_age": "the age of the norms",
    "aggregator": "what the aggregator remembers",
    "step": "the step",
}


def difference(here: PyTree, there: PyTree) -> str | None:
    """How a saved pytree differs from what is wanted, in words; None where it fits."""
    own, theirs = _by_path(here), _by_path(there)
    for path in own.keys() | theirs.keys():
        at = f" at {path!r}" if path else ""
        if path not in theirs:
            return f"has nothing{at}, where now there is {_described(own[path])}"
        if path not in own:
            return f"has {_described(theirs[path])}{at}, where now there is nothing"
        if _described(own[path]) != _described(theirs[path]):
            return f"has {_described(theirs[path])}{at}, where now there is {_described(own[path])}"
    return None


def _by_name(what: str, here: Mapping[str, Any], there: Mapping[str, Any], told: list[str]) -> dict[str, Any]:
    merged = dict(here)
    for name in here:
        if name not in there:
            begins = "begins with its first state" if what == "terms" else "begins with the weight given"
            told.append(f"term {name!r} is new and {begins}")
        elif (found := difference(here[name], there[name])) is not None:
            raise ValueError(
                f"term {name!r}: the saved state is of another term: it {found}; rename the term, and it "
                f"begins with its first state"
            )
        else:
            merged[name] = there[name]
    gone = [name for name in there if name not in here]
    told += [f"term {name!r} is gone" if what == "terms" else f"no rule moves {name!r}" for name in gone]
    return merged


def _check_version(saved: Mapping[str, Any]) -> None:
    held = np.asarray(saved.get("version", 0))
    if held.shape or held.dtype.kind not in "iu":
        raise ValueError(
            f"the saved state is of something else: its version is a whole number, got {held.dtype} of shape "
            f"{held.shape}"
        )
    version = int(held)
    if version > VERSION:
        raise ValueError(
            f"the saved state is of version {version}, and this jaxreg knows up to {VERSION}: it was "
            f"saved by a newer release; install that"
        )


def _by_path(tree: PyTree) -> dict[str, Any]:
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def _described(leaf: Any) -> str:
    if _is_key(leaf):
        return f"a random key {jnp.shape(leaf)}"
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _as_saved(like: Any, leaf: Any) -> Any:
    return leaf if _is_key(like) else jnp.asarray(leaf, jnp.result_type(like))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
