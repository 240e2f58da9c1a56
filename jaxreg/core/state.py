"""What an objective carries from step to step.

The step, for schedules; each stateful term's own state; the weights that a rule chose, and the rule's own;
what was measured last, where it is measured now and then, and the aggregator's own. Arrays under string keys,
with the version of this structure beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.shown import described
from jaxreg.base.types import Array, PyTree
from jaxreg.core.measured import first_measured
from jaxreg.core.notes import add_place
from jaxreg.core.passes import Pass
from jaxreg.core.plan import Leaves, Plan, who
from jaxreg.core.spec import remembers, requested_arguments

VERSION = 1  # of a state's structure; a state of 0.2.0 has none

REMEDY = (
    "pass state=objective.init() first and state=out.state from then on (objective is what compose returns, "
    "and out the report on a whole batch)"
)


def first_state(plan: Plan, leaves: Leaves) -> dict[str, Any]:
    """The state of step 0; empty where nothing needs one."""
    terms = {
        name: jax.tree.map(_fresh, _first(fn, f"the {who(name)}"))
        for name, fn in zip(plan.names, plan.fns(leaves), strict=True)
        if "state" in requested_arguments(fn)
    }
    state: dict[str, Any] = {}
    if terms:
        state["terms"] = terms
    if (rule := plan.rule(leaves)) is not None:
        chosen, own = _first(rule, "the weighting", dict(leaves.constants))
        state["weights"] = jax.tree.map(_fresh, {name: chosen[name] for name in plan.ruled})
        state["rules"] = jax.tree.map(_fresh, own)
    state |= jax.tree.map(_fresh, first_measured(plan, leaves))
    if any(plan.schedules) or state:
        number = jnp.asarray(VERSION, jnp.int32)
        state = {"version": number, "step": jnp.zeros((), jnp.int32), **state}
    return state


def step_of(state: PyTree, name: str) -> Array:
    """The step, for the schedule of the named term."""
    if not isinstance(state, Mapping) or "step" not in state:
        raise ValueError(
            f"{who(name)}: its weight is a schedule, which needs to know the step: {REMEDY}{_got(state)}"
        )
    return state["step"]


def own_state(state: PyTree, name: str) -> PyTree:
    """The named term's own state."""
    if not isinstance(state, Mapping) or name not in (state.get("terms") or {}):
        raise ValueError(f"{who(name)}: it asks for state: {REMEDY}{_got(state)}")
    return state["terms"][name]


def chosen_weight(state: PyTree, name: str) -> Array:
    """The weight that a rule chose for the named term."""
    if not isinstance(state, Mapping) or name not in (state.get("weights") or {}):
        raise ValueError(f"{who(name)}: a rule moves its weight, from step to step: {REMEDY}{_got(state)}")
    return jnp.asarray(state["weights"][name])


def none_if_empty(state: PyTree) -> PyTree:
    """The state; None for an empty one, which is no other program."""
    return None if isinstance(state, Mapping | tuple | list) and not state else state


def next_state(state: PyTree, by_name: Mapping[str, PyTree], moved: Mapping[str, PyTree]) -> PyTree:
    """The state for the next step, of this step's, what each term made of its own, and what else moved."""
    if state is None:
        return {}
    if not isinstance(state, Mapping):
        raise TypeError(f"state= is what objective.init() gives: {REMEDY}{_got(state)}")
    following = dict(state)
    if "step" in state:
        following["step"] = state["step"] + 1
    if "terms" in state:
        following["terms"] = {
            name: _checked(last, by_name[name], who(name)) for name, last in state["terms"].items()
        }
    for name, new in moved.items():
        following[name] = _checked(state[name], new, f"the objective's {name!r}")
    return jax.lax.stop_gradient(following)


def remembered(plan: Plan, leaves: Leaves, done: Pass, state: PyTree, x: PyTree) -> dict[str, PyTree]:
    """The next states of the terms that make them of the whole step."""
    if not isinstance(state, Mapping) or "terms" not in state:
        return {}
    found = {}
    for name, fn, value, extra in zip(plan.names, plan.fns(leaves), done.values, done.extras, strict=True):
        if name in state["terms"] and remembers(fn):
            fixed = jax.lax.stop_gradient((value, extra[0], x))
            try:
                found[name] = fn.remember(  # type: ignore[attr-defined]
                    state["terms"][name], value=fixed[0], metrics=fixed[1], params=fixed[2]
                )
            except Exception as error:
                add_place(error, f"remember() of the {who(name)} of the objective")
                raise
    return found


def _first(fn: Any, whose: str, *arguments: Any) -> Any:
    try:
        return fn.init(*arguments)
    except Exception as error:
        add_place(error, f"init() of {whose} of the objective")
        raise


def _got(state: PyTree) -> str:
    if state is None:
        return ""
    keys = f" with the keys {list(state)}" if isinstance(state, Mapping) else ""
    return f"; got {described(state) if hasattr(state, 'shape') else type(state).__name__}{keys}"


def _fresh(leaf: Any) -> Array:
    """A copy (so that donating the state is safe), and no weak type (so that nothing compiles twice)."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)


def _checked(last: PyTree, following: PyTree, whose: str) -> PyTree:
    def described(state: PyTree) -> tuple[Any, list[tuple[Any, Any]]]:
        leaves, treedef = jax.tree.flatten(state)
        return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if described(last) != described(following):
        raise TypeError(
            f"{whose}: its next state differs from its last one in structure, shape or dtype: "
            f"{described(last)} became {described(following)}"
        )
    return following
