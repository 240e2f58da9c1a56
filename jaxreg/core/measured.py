"""What is carried from one measurement to the next: norms now and then, an aggregator's own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.core.aggregate import combine_space, has_state, solve
from jaxreg.core.passes import Combined, Held, Norms, Pass, members
from jaxreg.core.plan import Leaves, Plan

NOT_YET = 0.0


def first_measured(plan: Plan, leaves: Leaves) -> dict[str, Any]:
    """The part of the first state that norms and an aggregator need; empty where they need none."""
    state: dict[str, Any] = {}
    if is_now_and_then(plan):
        norms = plan.norms
        assert norms is not None
        count = len(members(plan.on_params, plan.space))
        zeros = jnp.full((count,), NOT_YET, jnp.result_type(float))
        state["norms"] = {"terms": zeros, "total": zeros[0]}
        if norms.absolutes:
            state["norms"] |= {"abs_max": zeros, "abs_mean": zeros}
        if norms.gramian:
            state["norms"]["gramian"] = jnp.zeros((count, count), zeros.dtype)
        # So old that the first step measures.
        state["norms_age"] = jnp.asarray(norms.every - 1, jnp.int32)
    aggregator = plan.combiner(leaves)
    if aggregator is not None:
        own: dict[str, Any] = {}
        count = len(members(plan.on_params, combine_space(aggregator)))
        if has_state(aggregator):
            own["state"] = aggregator.init(count)
        if _is_held(plan, aggregator):
            own["last"] = _first_combined(aggregator, count, own.get("state"))
        if own:
            state["aggregator"] = own
    return state


def held(plan: Plan, aggregator: Any, state: PyTree) -> Held | None:
    """What was measured last, or None where every step measures."""
    if not is_now_and_then(plan):
        return None
    if not isinstance(state, Mapping) or "norms" not in state:
        norms = plan.norms
        assert norms is not None
        raise ValueError(
            f"GradNorms(every={norms.every}) carries the last norms from step to step: pass "
            f"state=objective.init() first and state=out.state from then on"
        )
    last, own = state["norms"], members(plan.on_params, plan.space)
    terms = _spread(last["terms"], own, len(plan.names))
    pairs: list[tuple[Array, Array] | None] = [None] * len(plan.names)
    if "abs_max" in last:
        for k, i in enumerate(own):
            pairs[i] = (last["abs_max"][k], last["abs_mean"][k])
    none: list[Array | None] = [None] * len(plan.names)
    norms_then = Norms(terms, none, pairs, last["total"], last.get("gramian"))
    combined = None
    if aggregator is not None and _is_held(plan, aggregator):
        then = state["aggregator"]["last"]
        combined = Combined(
            then["coefficients"], then["metrics"], state["aggregator"].get("state"), then["gramian"]
        )
    return Held(state["norms_age"] + 1 >= _every(plan), norms_then, combined)


def measured(plan: Plan, state: PyTree, done: Pass, now: Held | None) -> dict[str, Any]:
    """The same part of the next state."""
    moved: dict[str, Any] = {}
    if now is not None:
        assert done.norms is not None
        own = members(plan.on_params, plan.space)
        last: dict[str, Any] = {
            "terms": jnp.stack([jnp.asarray(done.norms.terms[i]) for i in own]),
            "total": done.norms.total,
        }
        if "abs_max" in state["norms"]:
            pairs = [done.norms.absolutes[i] or () for i in own]
            last["abs_max"], last["abs_mean"] = (jnp.stack([pair[k] for pair in pairs]) for k in range(2))
        if "gramian" in state["norms"]:
            last["gramian"] = done.norms.gramian
        moved["norms"] = last
        moved["norms_age"] = age(state, now)
    if done.combined is not None and isinstance(state, Mapping) and "aggregator" in state:
        carried = dict(state["aggregator"])
        if "state" in carried:
            carried["state"] = done.combined.state
        if "last" in carried:
            carried["last"] = {
                "coefficients": done.combined.coefficients,
                "metrics": done.combined.metrics,
                "gramian": done.combined.gramian,
            }
        moved["aggregator"] = carried
    return moved


def age(state: PyTree, now: Held) -> Array:
    """How many steps ago the norms of this step's output were measured."""
    return jnp.where(now.fresh, 0, state["norms_age"] + 1)


def is_now_and_then(plan: Plan) -> bool:
    """Whether not every step measures."""
    return plan.norms is not None and plan.norms.every > 1


def _every(plan: Plan) -> int:
    assert plan.norms is not None
    return plan.norms.every


def _is_held(plan: Plan, aggregator: Any) -> bool:
    """Whether the aggregator's coefficients are those of the last measurement, of the params' Gramian."""
    return is_now_and_then(plan) and combine_space(aggregator) == "params"


def _first_combined(aggregator: Any, count: int, state: PyTree) -> dict[str, Any]:
    """Zeros of what the aggregator will give, in the dtypes that are carried."""
    gram = jax.ShapeDtypeStruct((count, count), jnp.result_type(float))
    key = jax.eval_shape(jax.random.key, 0)
    given = jax.eval_shape(lambda gram, key, state: solve(aggregator, gram, key, state), gram, key, state)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), given)
    return {"coefficients": zeros.coefficients, "metrics": zeros.metrics, "gramian": zeros.gramian}


def _spread(values: Array, own: list[int], count: int) -> list[Array | None]:
    spread: list[Array | None] = [None] * count
    for k, i in enumerate(own):
        spread[i] = values[k]
    return spread
