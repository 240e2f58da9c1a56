"""The weights of a step: constants, schedules read at the state's step, or what a rule chose."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array, ArrayLike, PyTree, Schedule
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.state import chosen_weight, step_of

ROUNDING = 1e-6  # what a schedule may be below 0


def weight_leaf(weight: ArrayLike) -> Array:
    """A weight as the program takes it."""
    return jnp.asarray(weight, jnp.result_type(float))


def weights_at(plan: Plan, leaves: Leaves, state: PyTree) -> list[Array | None]:
    """One weight a term; None for the base loss, which has none."""
    weights: list[Array | None] = [None]
    for name, schedule in zip(plan.names[1:], plan.schedules[1:], strict=True):
        weight, held = leaves.constants[name], leaves.held.get(name, True)
        if isinstance(held, jax.core.Tracer) or not np.asarray(held).all():
            moved = (
                chosen_weight(state, name).astype(weight.dtype)
                if schedule is None
                else _read(schedule, name, state, weight.dtype)
            )
            weight = jnp.where(held, weight, moved)
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
    return _not_negative(weight, name)


def _not_negative(weight: Array, name: str) -> Array:
    """The weight; 0 where rounding made it less (a linear schedule to 0 may end at -2e-8), else NaN.

    NaN is what a traced program can say: the term is then named among those that are not finite.
    """
    if not isinstance(weight, jax.core.Tracer):
        _refuse_negative(float(weight), name)
    return jnp.where(weight < -ROUNDING, jnp.nan, jnp.maximum(weight, 0))


def check_schedule(schedule: Schedule, name: str) -> None:
    """Refuse one that begins with a negative weight. What else is wrong with it, the first trace tells."""
    try:
        first = float(cast(Any, schedule(jnp.zeros((), jnp.int32))))
    except Exception:
        return
    _refuse_negative(first, name)


def _refuse_negative(weight: float, name: str) -> None:
    if weight < -ROUNDING:
        raise ValueError(
            f"term {name!r}: its schedule gives {weight:g}, and a weight is ≥ 0; to reward what the term "
            f"measures, negate its value in fn"
        )
