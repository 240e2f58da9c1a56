"""The two programs of an objective: its value, and its value and gradient, each with the report."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxreg.base.shown import called
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.totals import is_part
from jaxreg.core.aggregate import not_differentiable
from jaxreg.core.bind import bind_ask, bind_forward, bind_terms, check_argument
from jaxreg.core.gradients import differentiate, evaluate
from jaxreg.core.measured import age, measured
from jaxreg.core.named import Regularizers
from jaxreg.core.output import AggregationOutput, BaseLossOutput, CustomLossOutput, RegularizerOutput
from jaxreg.core.parted import approximate_terms
from jaxreg.core.passes import Ask, BoundTerm, Pass, members, weighted
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.rules import moved_weights
from jaxreg.core.spec import remembers
from jaxreg.core.state import next_state, remembered


def call(
    plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[Array, CustomLossOutput]:
    """``(loss_total, report)``."""
    check_argument(plan, x)
    terms = bind_terms(plan, leaves, batch, state, key, x)
    done = evaluate(terms, bind_forward(plan, leaves, batch, key), x)
    out = report(plan, leaves, terms, done, state, Ask(), x, is_part(batch))
    out = _own_state(plan, leaves, batch, out)
    return out.loss_total, out


def value_and_grad(
    plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> tuple[tuple[Array, CustomLossOutput], PyTree]:
    """``((loss_total, report), gradient)``."""
    check_argument(plan, x)
    if plan.aggregator is not None and is_part(batch):
        raise ValueError(
            f"aggregator {called(plan.combiner(leaves))}: the batch is a part of one (batch.totals), and how "
            f"gradients are combined goes by those of all parts: use jaxreg.accumulate (axis_name= inside "
            f"shard_map), or send one batch in several requests, requests=n"
        )
    terms = bind_terms(plan, leaves, batch, state, key, x)
    ask = bind_ask(plan, leaves, state, key, batch)
    done = differentiate(terms, bind_forward(plan, leaves, batch, key), x, ask)
    out = report(plan, leaves, terms, done, state, ask, x, is_part(batch))
    out = _own_state(plan, leaves, batch, out)
    return (out.loss_total, out), done.gradient


def _own_state(plan: Plan, leaves: Leaves, batch: PyTree, out: CustomLossOutput) -> CustomLossOutput:
    """The report; of a part, without a next state where that goes by the numbers of the whole batch."""
    if is_part(batch) and (plan.weighting is not None or any(map(remembers, plan.fns(leaves)))):
        return out.replace(state={})  # type: ignore[attr-defined, no-any-return]
    return out


def report(
    plan: Plan,
    leaves: Leaves,
    terms: list[BoundTerm],
    done: Pass,
    state: PyTree,
    ask: Ask,
    x: PyTree,
    part: bool,
) -> CustomLossOutput:
    """What a pass over a batch (or a part of one) gave, as people see it, and the state of the next step."""
    own = [_measured_of(done, i) for i in range(len(terms))]
    regularizers: Regularizers[RegularizerOutput] = Regularizers()
    regularizer_total = jnp.zeros_like(done.total)
    for i, name in enumerate(plan.names[1:], start=1):
        weight, norm = terms[i].weight, own[i]["grad_norm"]
        assert weight is not None  # only the base loss has none
        contribution = weighted(weight, done.values[i])
        regularizer_total = regularizer_total + contribution
        regularizers[name] = RegularizerOutput(
            name=name,
            value=done.values[i],
            weight=weight,
            contribution=contribution,
            grad_norm_weighted=None if norm is None else weighted(weight, norm),
            custom=done.extras[i][0],
            **own[i],
        )
    gramian, among = _gramian_of(plan, done, ask)
    out = CustomLossOutput(
        loss_total=done.total if plan.aggregator is None else not_differentiable(done.total),
        base_loss=BaseLossOutput(done.values[0], custom=done.extras[0][0], **own[0]),
        regularizers=regularizers,
        regularizer_total=regularizer_total,
        total_grad_norm=done.norms.total if done.norms else None,
        aux=done.aux,
        gramian=gramian,
        norms_age=None if ask.held is None else age(state, ask.held),
        aggregation=_aggregation(plan, done, ask),
        gramian_terms=among,
        approximate=approximate_terms(plan, leaves) if part else (),
    )
    by_name = {name: extra[1] for name, extra in zip(plan.names, done.extras, strict=True)}
    by_name |= remembered(plan, leaves, done, state, x)
    moved = measured(plan, state, done, ask.held)
    if plan.weighting is not None:
        moved |= moved_weights(plan.rule(leaves), plan.ruled, out, state)
    return out.replace(state=next_state(state, by_name, moved))  # type: ignore[attr-defined, no-any-return]


def _measured_of(done: Pass, i: int) -> dict[str, Any]:
    """What was measured of one term, by the names of its output's fields."""
    norms = done.norms
    if norms is None:
        return dict.fromkeys(("grad_norm", "grad_norm_per_datum", "grad_abs_max", "grad_abs_mean"))
    largest, mean = norms.absolutes[i] or (None, None)
    return {
        "grad_norm": norms.terms[i],
        "grad_norm_per_datum": norms.per_datum[i],
        "grad_abs_max": largest,
        "grad_abs_mean": mean,
    }


def _gramian_of(plan: Plan, done: Pass, ask: Ask) -> tuple[Array | None, tuple[str, ...]]:
    """The Gramian that is reported, and of which terms: the one that is tracked, else the aggregator's."""
    if done.norms is not None and done.norms.gramian is not None:
        return done.norms.gramian, _names(plan, ask.space)
    if done.combined is not None and ask.combine is not None:
        return done.combined.gramian, _names(plan, ask.combine.space)
    return None, ()


def _aggregation(plan: Plan, done: Pass, ask: Ask) -> AggregationOutput | None:
    if done.combined is None or ask.combine is None:
        return None
    names = _names(plan, ask.combine.space)
    return AggregationOutput(
        Regularizers((name, done.combined.coefficients[k]) for k, name in enumerate(names)),
        done.combined.metrics,
    )


def _names(plan: Plan, space: Any) -> tuple[str, ...]:
    return tuple(plan.names[i] for i in members(plan.on_params, space))
