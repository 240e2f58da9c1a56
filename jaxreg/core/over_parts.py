"""The parts of a batch one after the other, in a scan; where an aggregator asks for it, in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.micro_batches import seen
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.core import part_sums
from jaxreg.core.bind import bind_forward, bind_terms
from jaxreg.core.part_sums import Sums, Want
from jaxreg.core.passes import BoundTerm, Pass
from jaxreg.core.plan import Leaves, Plan, who
from jaxreg.core.pullback import Model, run_forward
from jaxreg.core.spec import remembers

OnePart: TypeAlias = Callable[[PyTree, Array, PyTree], tuple[Sums, PyTree]]  # of a part, its number, states


def over_parts(
    plan: Plan,
    leaves: Leaves,
    x: PyTree,
    parts: PyTree,
    state: PyTree,
    key: Array | None,
    want: Want,
    axis_name: Any,
) -> Pass:
    """The pass over the whole batch, of parts [n, B', ...]."""
    states = states_of(plan, leaves, state)
    if states and axis_name is not None:
        raise ValueError(
            f"{who(next(iter(states)))}: its own call moves its state, on each device by that device's rows; "
            f"with axis_name= it needs a method remember(state, *, value, metrics, params), which moves it "
            f"once a step, by the whole's numbers"
        )

    def bound(part: PyTree, i: Array, states: PyTree) -> tuple[list[BoundTerm], Model]:
        own = None if key is None else jax.random.fold_in(key, i)
        return bound_part(plan, leaves, x, part, with_states(state, states), own)

    def measured(part: PyTree, i: Array, states: PyTree) -> tuple[Sums, PyTree]:
        return sums_of(*bound(part, i, states), x, part, want)

    def summed(one: OnePart) -> tuple[Sums, PyTree]:
        return _scanned(one, parts, states, want, axis_name)

    sums, (aux, per_datum) = summed(measured)
    combined = None
    if want.twice:
        assert want.ask.combine is not None
        assert sums.gramian is not None
        combined = want.ask.combine.solve(sums.gramian)
        coefficients = combined.coefficients

        def pulled_back(part: PyTree, i: Array, states: PyTree) -> tuple[Sums, PyTree]:
            terms, model = bound(part, i, states)
            return part_sums.of_combined_part(terms, model, x, want, coefficients), None

        again, _ = summed(pulled_back)
        sums = sums._replace(gradient=again.gradient, total=again.total)
    if per_datum is not None:
        packed = isinstance(parts, TokenBatch) and parts.segment_ids is not None
        # A datum has its tokens in one part, and 0 in the others.
        per_datum = [jnp.max(own, axis=0) if packed else own.reshape(-1) for own in per_datum]
    terms = bind_terms(plan, leaves, jax.tree.map(lambda leaf: leaf[0], parts), state, key, x)
    done = part_sums.finished(terms, sums, x, want, per_datum)._replace(aux=aux)
    return done if combined is None else done._replace(combined=combined)


def _scanned(
    one: OnePart, parts: PyTree, states: dict[str, PyTree], want: Want, axis_name: Any
) -> tuple[Sums, PyTree]:
    """What the sums of all parts add up to, on all devices, and by part what is beside them."""

    def following(sums: Sums, at: tuple[PyTree, Array]) -> tuple[Sums, PyTree]:
        here, beside = one(*at, sums.states)
        return varying(part_sums.added(sums, here, want), axis_name), beside

    numbered = (parts, jnp.arange(len(jax.tree.leaves(parts)[0])))
    like, _ = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], numbered), states)
    first = varying(part_sums.nothing(like, want)._replace(states=states), axis_name)
    sums, beside = lax.scan(following, first, numbered)
    return (sums if axis_name is None else part_sums.over_devices(sums, want, axis_name)), beside


def bound_part(
    plan: Plan, leaves: Leaves, x: PyTree, part: PyTree, state: PyTree, key: Array | None
) -> tuple[list[BoundTerm], Model]:
    """The terms as functions of one part's outputs, and the model that was run on it."""
    terms = bind_terms(plan, leaves, part, state, key, x)
    return terms, run_forward(bind_forward(plan, leaves, part, key), x)


def sums_of(
    terms: Sequence[BoundTerm], model: Model, x: PyTree, part: PyTree, want: Want
) -> tuple[Sums, PyTree]:
    """One part's sums, and what forward returned beside its outputs, and norms a datum."""
    if isinstance(part, TokenBatch):
        want = want._replace(ask=want.ask._replace(segments=part.segments))
    sums, per_datum = part_sums.of_part(terms, model, x, want)
    own, whole = seen(part)
    return sums._replace(seen=own, whole=whole, alike=jnp.asarray(True)), (model.aux, per_datum)


def states_of(plan: Plan, leaves: Leaves, state: PyTree) -> dict[str, PyTree]:
    """The states that go from part to part: of terms whose own call moves them."""
    if not isinstance(state, Mapping) or "terms" not in state:
        return {}
    fns = dict(zip(plan.names, plan.fns(leaves), strict=True))
    return {name: own for name, own in state["terms"].items() if not remembers(fns[name])}


def with_states(state: PyTree, states: PyTree) -> PyTree:
    """A state whose terms' are these."""
    return {**state, "terms": {**state["terms"], **states}} if states else state


def varying(tree: PyTree, axis_name: Any) -> PyTree:
    """The tree as each device's own, so that a gradient is no sum over devices before it is to be one."""
    if axis_name is None:
        return tree
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def vary(leaf: Any) -> Any:
        missing = tuple(name for name in names if name not in _varies_over(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varies_over(leaf: Any) -> Any:
    """The axes over whose devices a value differs, as far as they are tracked."""
    kind = jax.typeof(leaf)
    tracked = getattr(kind, "manual_axis_type", None)  # since jax 0.10, before it `vma`
    return getattr(kind, "vma", ()) if tracked is None else tracked.varying
