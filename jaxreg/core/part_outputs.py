"""The reports on the parts of a batch, put together to the whole's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxreg.base.shown import called
from jaxreg.base.types import Array, PyTree
from jaxreg.core import part_sums
from jaxreg.core.bind import bind_terms
from jaxreg.core.named import Regularizers
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from jaxreg.core.part_sums import Sums, Want
from jaxreg.core.parted import kinds_of
from jaxreg.core.passes import Ask, members
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.spec import remembers, requested_arguments
from jaxreg.core.state import none_if_empty
from jaxreg.core.step import report


def merge_outputs(
    objective: CompositeLoss, outputs: Sequence[CustomLossOutput], *, state: PyTree = None
) -> CustomLossOutput:
    """The report on a whole batch, of the reports on its parts; gradients add up by themselves.

    For parts that were evaluated apart: several remote calls with ``totals_of=`` before one ``optim_step``,
    or several processes. `accumulate` and ``requests=`` do it themselves.

    Args:
      objective: of all of them.
      outputs: one a part, each evaluated with the state of the step.
      state: that state; the merged report then has the next step's, with a rule's weights moved by the
        whole batch's numbers.

    Raises:
      ValueError: there is none; or of an objective whose parts cannot be told from their reports: norms of
        the params' gradients do not add up, nor do norms of some steps, or means of magnitudes that a rule
        reads (``grad_abs_mean`` is None); an aggregator and stateful terms need all parts at once.

    Reports do not tell whether all parts are there.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(jr.losses.CrossEntropy(), track_grad_norms=True)
      >>> batch = jr.TokenBatch.pack([{"lp": [-1.0, -2.0, -3.0]}, {"lp": [-6.0]}])
      >>> outs = [objective.value_and_grad(part["lp"], part)[0][1] for part in batch.split(2)]
      >>> out = jr.merge_outputs(objective, outs)
      >>> out.loss_total.item(), round(out.total_grad_norm.item(), 4)  # ½ = ‖(¼, ¼, ¼, ¼)‖
      (3.0, 0.5)
    """
    found: list[Any] = list(outputs)
    if not found:
        raise ValueError("merge_outputs takes one output a part, got none")
    plan = objective.plan
    for i, out in enumerate(found):
        if not isinstance(out, CustomLossOutput) or tuple(out.regularizers) != plan.names[1:]:
            what = list(out.regularizers) if isinstance(out, CustomLossOutput) else type(out).__name__
            raise ValueError(
                f"merge_outputs: output {i} is of other terms, {what}; the objective has "
                f"{list(plan.names[1:])}"
            )
    _refuse(plan, objective.leaves)
    merged: CustomLossOutput = objective._run(
        _merge, None, [out.replace(state={}, aux=None) for out in found], none_if_empty(state), None
    )
    return merged


def _refuse(plan: Plan, leaves: Leaves) -> None:
    if plan.norms is not None and plan.space == "params":
        raise ValueError(
            "merge_outputs: norms of the params' gradients are not those of their parts; track them at the "
            "outputs, GradNorms(wrt='outputs'), or use jaxreg.accumulate"
        )
    if plan.norms is not None and plan.norms.every > 1:
        raise ValueError(
            f"merge_outputs: of norms that are measured now and then, GradNorms(every={plan.norms.every}), "
            f"reports carry old ones, which are the whole's and do not add up: leave every= out, use "
            f"jaxreg.accumulate, or send one batch in several requests, requests=n"
        )
    rule = plan.rule(leaves)
    if rule is not None and "absolutes" in rule.needs:
        raise ValueError(
            f"merge_outputs: the rule {called(rule)} reads mean magnitudes, which are by how many elements "
            f"the parts had, and reports do not say that: use jaxreg.accumulate, or send one batch in "
            f"several requests, requests=n"
        )
    if plan.aggregator is not None:
        raise ValueError(
            "merge_outputs: an aggregator needs the gradients of all parts before it combines any: use "
            "jaxreg.accumulate, or send one batch in several requests, requests=n"
        )
    fns = [fn for fn in plan.fns(leaves) if "state" in requested_arguments(fn)]
    if any(not remembers(fn) or "params" in requested_arguments(fn) for fn in fns):
        raise ValueError(
            "merge_outputs: stateful terms saw the parts apart, and none of their states is that of the "
            "whole: use jaxreg.accumulate, or send one batch in several requests, requests=n"
        )


def _merge(
    plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
) -> CustomLossOutput:
    ask = Ask(plan.norms, plan.space)
    want = Want(ask, plan.names, False, [kinds_of(fn) for fn in plan.fns(leaves)])
    sums = functools.reduce(
        lambda a, b: part_sums.added(a, b, want), [_sums_of(plan, out, want) for out in batch]
    )
    terms = bind_terms(plan, leaves, None, state, key)
    out = report(plan, leaves, terms, part_sums.finished(terms, sums, x, want, None), state, ask, x, True)
    # By how many elements the parts had, which no report says.
    terms_out = {name: term.replace(grad_abs_mean=None) for name, term in out.regularizers.items()}  # type: ignore[attr-defined]
    base = out.base_loss.replace(grad_abs_mean=None)  # type: ignore[attr-defined]
    return out.replace(base_loss=base, regularizers=Regularizers(terms_out))  # type: ignore[attr-defined, no-any-return]


def _sums_of(plan: Plan, out: CustomLossOutput, want: Want) -> Sums:
    """What one part's report adds to the sums."""
    every: list[BaseLossOutput | RegularizerOutput] = [out.base_loss, *out.regularizers.values()]
    extras = [(term.custom, None) for term in every]
    sums = part_sums.plain([term.value for term in every], extras, want)
    if plan.norms is None:
        return sums
    own: list[Any] = [every[i] for i in members(plan.on_params, "outputs")]
    return sums._replace(
        norms=[term.grad_norm for term in own],
        total=out.total_grad_norm,
        gramian=out.gramian,
        absolutes=[(t.grad_abs_max, jnp.zeros(())) for t in own] if plan.norms.absolutes else None,
    )
