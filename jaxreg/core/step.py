"""The two programs of an objective: its value, and its value and gradient, each with the report."""

from __future__ import annotations

import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.core.bind import bind_forward, bind_terms, check_argument
from jaxreg.core.gradients import BoundTerm, Pass, differentiate, evaluate, weighted
from jaxreg.core.named import Regularizers
from jaxreg.core.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.state import next_state


def call(
    plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[Array, CustomLossOutput]:
    """``(loss_total, report)``."""
    check_argument(plan, x)
    terms = bind_terms(plan, leaves, batch, state, key)
    done = evaluate(terms, bind_forward(plan, leaves, batch, key), x)
    return done.total, _report(plan, terms, done, state)


def value_and_grad(
    plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
    """``((loss_total, report), gradient)``."""
    check_argument(plan, x)
    terms = bind_terms(plan, leaves, batch, state, key)
    done = differentiate(terms, bind_forward(plan, leaves, batch, key), x, plan.norms)
    return (done.total, _report(plan, terms, done, state)), done.gradient


def _report(plan: Plan, terms: list[BoundTerm], done: Pass, state: PyTree) -> CustomLossOutput:
    none: list[Array | None] = [None] * len(terms)
    grad_norms, per_datum = (done.norms.terms, done.norms.per_datum) if done.norms else (none, none)
    regularizers: Regularizers[RegularizerOutput] = Regularizers()
    regularizer_total = jnp.zeros_like(done.total)
    for i, name in enumerate(plan.names[1:], start=1):
        weight, norm = terms[i].weight, grad_norms[i]
        assert weight is not None  # only the base loss has none
        contribution = weighted(weight, done.values[i])
        regularizer_total = regularizer_total + contribution
        regularizers[name] = RegularizerOutput(
            name=name,
            value=done.values[i],
            weight=weight,
            contribution=contribution,
            grad_norm=norm,
            grad_norm_weighted=None if norm is None else weighted(weight, norm),
            custom=done.extras[i][0],
            grad_norm_per_datum=per_datum[i],
        )
    next_states = {name: extra[1] for name, extra in zip(plan.names, done.extras, strict=True)}
    return CustomLossOutput(
        loss_total=done.total,
        base_loss=BaseLossOutput(done.values[0], grad_norms[0], done.extras[0][0], per_datum[0]),
        regularizers=regularizers,
        regularizer_total=regularizer_total,
        total_grad_norm=done.norms.total if done.norms else None,
        state=next_state(state, next_states),
        aux=done.aux,
    )
