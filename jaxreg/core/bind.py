"""Close every term, and the model, over all but the value that is differentiated."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.paths import leaf_paths
from jaxreg.base.shown import called, described
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import is_part
from jaxreg.core.aggregate import combine_space, has_state, solve
from jaxreg.core.measured import held
from jaxreg.core.notes import add_place
from jaxreg.core.parted import of_part
from jaxreg.core.passes import Ask, BoundTerm, Combine, Combined
from jaxreg.core.plan import Leaves, Plan, who
from jaxreg.core.spec import call_term, has_default, requested_arguments
from jaxreg.core.state import REMEDY, own_state
from jaxreg.core.weights import weights_at


def bind_terms(
    plan: Plan, leaves: Leaves, batch: PyTree, state: PyTree, key: Array | None, x: PyTree = None
) -> list[BoundTerm]:
    """The terms as functions of the differentiated value, each with the weight of this step.

    ``x`` is for terms that ask for the params beside it.
    """
    fns, weights = plan.fns(leaves), weights_at(plan, leaves, state)
    terms = []
    for i, (name, fn, place, weight) in enumerate(zip(plan.names, fns, plan.places, weights, strict=True)):
        extra = _own_key(fn, key, name, who(name))
        if "state" in requested_arguments(fn):
            extra["state"] = own_state(state, name)
        if "params" in requested_arguments(fn):
            extra["params"] = jax.lax.stop_gradient(x)
        # Without a model there is one space: x is the params, where a term says that it is on them.
        on_params = place == "params" and plan.model is not None
        terms.append(BoundTerm(_bound(plan, i, fn, batch, extra), weight, on_params, who(name)))
    return terms


def bind_ask(plan: Plan, leaves: Leaves, state: PyTree, key: Array | None, batch: PyTree = None) -> Ask:
    """What the pass is to find besides the gradient: norms, and what an aggregator makes of a Gramian.

    ``batch`` says whose each token is, for norms a datum.
    """
    segments = batch.segments if isinstance(batch, TokenBatch) else None
    return _asked(plan, leaves, state, key)._replace(segments=segments)


def _asked(plan: Plan, leaves: Leaves, state: PyTree, key: Array | None) -> Ask:
    aggregator = plan.combiner(leaves)
    now = held(plan, aggregator, state)
    if aggregator is None:
        return Ask(plan.norms, plan.space, None, now)
    own = None
    if has_state(aggregator):
        if not isinstance(state, Mapping) or "state" not in state.get("aggregator", {}):
            raise ValueError(f"aggregator {called(aggregator)}: it carries a state: {REMEDY}")
        own = state["aggregator"]["state"]
    if key is not None:
        check_key(key, "the aggregator")
        key = jax.random.fold_in(key, zlib.crc32(b"/aggregator") & 0x7FFFFFFF)  # a name that no term may have

    def combine(gramian: Array) -> Combined:
        return solve(aggregator, gramian, key, own)

    return Ask(plan.norms, plan.space, Combine(combine_space(aggregator), combine), now)


def bind_forward(
    plan: Plan, leaves: Leaves, batch: PyTree, key: Array | None
) -> Callable[[PyTree], tuple[PyTree, PyTree]] | None:
    """The model as a function of its params to ``(outputs, aux)``, or None where there is no model."""
    if plan.model is None:
        return None
    model = plan.model.with_arrays(leaves.model)
    extra = _own_key(model, key, "/forward", "forward")  # a name that no term may have

    def forward(params: PyTree) -> tuple[PyTree, PyTree]:
        try:
            with jax.named_scope("forward"):
                outputs: Any = model(params, batch, **extra)
        except Exception as error:
            add_place(error, "forward(params, batch)", params=params, batch=batch)
            raise
        aux = None
        if plan.has_aux:
            if not (isinstance(outputs, tuple) and len(outputs) == 2):
                raise TypeError(
                    f"forward: with has_aux=True it returns (outputs, aux), got {type(outputs).__name__}"
                )
            outputs, aux = outputs
        check_differentiable(
            outputs,
            "what forward returns",
            "let forward return floating-point (or complex) arrays only; for others, let it return (outputs, "
            "others) and say compose(..., has_aux=True): they come back in out.aux",
        )
        return outputs, jax.lax.stop_gradient(aux)

    return forward


def check_argument(plan: Plan, x: PyTree) -> None:
    """Refuse an x that has no gradient. JAX refuses it, too, but does not say which leaf it is."""
    check_differentiable(
        x,
        "x" if plan.model is None else "params",
        "differentiate floating-point (or complex) arrays only (jnp.asarray(..., float)), and put the others "
        "into the batch or close forward over them (nnx.split(model, nnx.Param, ...), equinox.partition)",
    )


def check_differentiable(tree: PyTree, what: str, remedy: str) -> None:
    """Refuse a pytree with a leaf that has no gradient, and name the leaf."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{what} has no array in it, so there is nothing to differentiate")
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        where = f"{what}, at {path!r}," if path else what
        try:
            if isinstance(leaf, str | type):  # which may name a dtype
                raise TypeError(leaf)
            dtype = jnp.result_type(leaf)
        except (TypeError, ValueError):
            raise TypeError(
                f"{where} is no array but {type(leaf).__name__}; part the arrays from the rest first "
                f"(nnx.split, equinox.partition) and put them together in forward"
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"{where} has dtype {dtype}, which has no gradient; {remedy}")


def _bound(
    plan: Plan, i: int, fn: TermFn, batch: PyTree, extra: dict[str, Any]
) -> Callable[[PyTree], tuple[Array, tuple[dict[str, Array], PyTree]]]:
    whose, part = who(plan.names[i]), is_part(batch)

    def bound(x: PyTree) -> tuple[Array, tuple[dict[str, Array], PyTree]]:
        def call(batch: PyTree) -> tuple[Array, dict[str, Array], PyTree]:
            return call_term(fn, x, batch, extra, whose)

        with jax.named_scope(whose.replace(" ", "_")):
            value, metrics, next_state = of_part(call, plan, i, fn, batch) if part else call(batch)
        return value, (metrics, next_state)

    return bound


def _own_key(fn: TermFn, key: Array | None, name: str, whose: str) -> dict[str, Any]:
    """The ``key`` argument, if fn asks for one: its own, which adding or dropping a term does not change."""
    if "key" not in requested_arguments(fn) or (key is None and has_default(fn, "key")):
        return {}
    if key is None:
        raise ValueError(f"{whose}: it asks for a random key: pass key=jax.random.key(seed)")
    check_key(key, whose)
    return {"key": jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)}


def check_key(key: Any, whose: str) -> None:
    """Refuse what is not one random key, of either of JAX's kinds."""
    shape, dtype = jnp.shape(key), jnp.result_type(key)
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape == () if typed else (dtype == jnp.uint32 and len(shape) == 1):
        return
    several = "; take one of them, or vmap over them" if typed or dtype == jnp.uint32 else ""
    raise (ValueError if several else TypeError)(
        f"{whose}: key= is one random key, jax.random.key(seed); got {described(key)}{several}"
    )
