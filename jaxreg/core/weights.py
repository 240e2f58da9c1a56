"""The weights of a step: constants, or schedules read at the state's step."""

from __future__ import annotations

import jax.numpy as jnp

from jaxreg.base.types import Array, ArrayLike, PyTree, Schedule
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.state import step_of


def weight_leaf(weight: ArrayLike) -> Array:
    """A weight as the program takes it."""
    return jnp.asarray(weight, jnp.result_type(float))


def weights_at(plan: Plan, leaves: Leaves, state: PyTree) -> list[Array | None]:
    """One weight a term; None for the base loss, which has none."""
    weights: list[Array | None] = [None]
    for name, schedule in zip(plan.names[1:], plan.schedules[1:], strict=True):
        weight = leaves.constants[name]
        if schedule is not None:
            scheduled = _read(schedule, name, state, weight.dtype)
            weight = jnp.where(leaves.held[name], weight, scheduled)
        weights.append(weight)
    return weights


def _read(schedule: Schedule, name: str, state: PyTree, dtype: jnp.dtype) -> Array:
    step = step_of(state, name)
    try:
        weight = jnp.asarray(schedule(step), dtype)
    except Exception as error:
        error.add_note(
            f"This happened in the schedule of term {name!r}, whose step is traced: it takes "
            f"jnp.where(step < n, a, b) where Python has `a if step < n else b`."
        )
        raise
    if weight.shape != ():
        raise ValueError(f"term {name!r}: its schedule gives shape {weight.shape}, not a scalar")
    return jnp.maximum(weight, 0)  # No weight is negative, but a linear schedule to 0 may end at -2e-8.
