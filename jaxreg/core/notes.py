"""What an error in a term or in the model is told beside: where it happened, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

_TRACED: tuple[tuple[type[Exception], str], ...] = (  # the narrow ones first
    (
        jax.errors.TracerBoolConversionError,
        "Its arrays are traced, so Python's if, while, and, or and not cannot look at them: "
        "say jnp.where(condition, a, b) for `a if condition else b`, or jax.lax.cond.",
    ),
    (
        jax.errors.TracerArrayConversionError,
        "Its arrays are traced, which NumPy cannot read: say jnp for np. What has to run outside of JAX is a "
        "jaxreg.host.HostRegularizer.",
    ),
    (
        jax.errors.TracerIntegerConversionError,
        "Its arrays are traced, so none of them can be the index of a list, or a size: say jnp.take, or let "
        "the number be a constant.",
    ),
    (
        jax.errors.NonConcreteBooleanIndexError,
        "Its arrays are traced, so their shapes cannot depend on numbers: say jnp.where(mask, x, 0) for "
        "`x[mask]`.",
    ),
    (
        jax.errors.ConcretizationTypeError,
        "Its arrays are traced and hold no number yet: leave out float(), int() and .item(), and say "
        "jnp.where for a choice.",
    ),
)


def add_place(error: Exception, where: str, **given: Any) -> None:
    """Note where an error happened, once, and what may help; ``given`` is what was called with, by name."""
    known = getattr(error, "__notes__", ())
    place = f"This happened in {where}."
    if not any(note.startswith(place) for note in known):
        error.add_note(" ".join([place, *_hints(error, given)]))


def _hints(error: Exception, given: Mapping[str, Any]) -> list[str]:
    hints = [hint for kind, hint in _TRACED if isinstance(error, kind)][:1]
    batch = given.get("batch")
    if isinstance(error, KeyError) and "it has" not in str(error):  # not a message of ours
        hints += [
            f"{name} has {sorted(map(str, value))}."
            for name, value in given.items()
            if isinstance(value, Mapping)
        ]
    if batch is None and "batch" in given and "'NoneType'" in str(error):
        hints.append("batch is None: give the objective one after x.")
    if isinstance(error, AttributeError) and isinstance(batch, dict) and error.obj is batch:
        hints.append(
            "batch is a dict; what has mean, sum, mask and their kin is a jaxreg.TokenBatch: make it one "
            "with jaxreg.TokenBatch.from_arrays(**batch)."
        )
    return hints
