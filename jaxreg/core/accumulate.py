"""One step over a batch that does not fit at once: its parts one after the other, and what they add up to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.micro_batches import micro_batches
from jaxreg.batch.parts import check_together
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import is_part
from jaxreg.core import part_sums
from jaxreg.core.aggregate import refuse_nonfinite
from jaxreg.core.bind import bind_ask, bind_forward, bind_terms, check_argument
from jaxreg.core.gradients import as_held
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.over_parts import bound_part, over_parts, states_of, sums_of, varying, with_states
from jaxreg.core.part_sums import Sums, Want
from jaxreg.core.parted import kinds_of
from jaxreg.core.passes import Ask, Pass
from jaxreg.core.plan import Leaves, Plan
from jaxreg.core.state import none_if_empty
from jaxreg.core.step import report

Result = tuple[tuple[Array, CustomLossOutput], PyTree]


def accumulate(
    objective: CompositeLoss,
    x: PyTree,
    batch: PyTree,
    *,
    steps: int,
    state: PyTree = None,
    key: Array | None = None,
    axis_name: Any = None,
) -> Result:
    """``objective.value_and_grad`` over a batch that is taken in micro-batches, by one compiled scan.

    The loss, every term's value, the gradient, norms, the Gramian and metrics are the whole batch's: means
    divide by what counts in all of it, however unequal the parts are. Memory is that of one micro-batch and
    one gradient; with norms in parameter space, or an aggregator, of one gradient a term.

    Args:
      objective: made by `compose`, of terms whose parts add up (``additive``, see `RegularizerSpec`), or
        are marked as approximate. All built-in terms say what they do.
      x: what all micro-batches share: the params, with ``forward`` or without.
      batch: a `TokenBatch`, or a mapping of arrays [B, ...]. Rows that belong together (pairs) stay
        together; where ``steps`` does not divide the rows, padding fills up the last micro-batch.
      steps: how many micro-batches.
      state: as for ``objective.value_and_grad``. The step, rules, and norms now and then go by whole
        batches; a stateful term sees the micro-batches one after the other.
      key: a random key; each micro-batch gets its own, folded with its number.
      axis_name: inside `jax.shard_map`, the mesh axis that the batch's rows are spread over: all is then
        of the rows of all devices, and the same on each.

    Returns:
      ``((loss_total, CustomLossOutput), gradient)``. ``out.aux`` has a leading axis of ``steps``; a metric
      whose kind no term names (``metric_kinds``) is left out.

    Raises:
      ValueError: a term that does not say that its parts add up, rows that cannot be cut, no such axis.
      TypeError: a batch of another kind.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(
      ...     jr.losses.CrossEntropy(), [dict(name="decay", fn=jr.regularizers.WeightL2(), weight=0.1)],
      ...     forward=lambda params, batch: params["w"] * batch["logprobs"], track_grad_norms=True)
      >>> batch = jr.TokenBatch.pack([{"logprobs": [-1.0, -2.0, -3.0]}, {"logprobs": [-6.0]}])
      >>> (loss, out), grads = jr.accumulate(objective, {"w": jnp.array(1.0)}, batch, steps=2)
      >>> round(loss.item(), 4), round(grads["w"].item(), 4)  # 3, the mean of four tokens; not 4
      (3.1, 3.2)
    """
    _check(objective, x, batch)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(f"accumulate: steps is the number of micro-batches, a whole number; got {steps!r}")
    if steps < 1:
        raise ValueError(f"accumulate: steps is the number of micro-batches, at least 1; got {steps}")
    if isinstance(batch, TokenBatch) and batch.segments is not None:  # while it can be looked at
        together = part_sums.group_of(objective.plan.fns(objective.leaves))
        check_together(batch, 2 if together == 1 and batch.pairs is not None else together, int(steps))
    axes = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    done = objective._run(_program(int(steps), axes), x, batch, none_if_empty(state), key)
    return _finite(objective, done)


def add_part(
    objective: CompositeLoss,
    sums: Sums | None,
    x: PyTree,
    part: PyTree,
    *,
    state: PyTree = None,
    key: Array | None = None,
) -> Sums:
    """`accumulate` in a Python loop: what the parts so far add up to, and one more.

    Args:
      objective, x: as there.
      sums: what the last call gave; None at first. A pytree, which may be donated.
      part: one of ``batch.split(n)``, or of several batches that know one whole's totals.
      state: of the step: the same for all of its parts.
      key: of this part.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(jr.losses.CrossEntropy(), forward=lambda w, batch: w * batch["logprobs"])
      >>> batch = jr.TokenBatch.pack([{"logprobs": [-1.0, -2.0, -3.0]}, {"logprobs": [-6.0]}])
      >>> params, sums = jnp.array(1.0), None
      >>> for part in batch.split(2):
      ...     sums = jr.add_part(objective, sums, params, part)
      >>> (loss, out), grads = jr.finish_parts(objective, sums, params)
      >>> loss.item(), grads.item()
      (3.0, 3.0)
    """
    _check(objective, x, part)
    if not is_part(part):
        raise ValueError(
            "add_part: this batch does not say that it is a part of one: take the parts of batch.split(n), "
            "or give each the whole's totals, part.with_totals(whole.own_totals())"
        )
    return objective._run(_add, x, (sums, part), none_if_empty(state), key)  # type: ignore[no-any-return]


def finish_parts(
    objective: CompositeLoss, sums: Sums, x: PyTree, *, state: PyTree = None, key: Array | None = None
) -> Result:
    """What ``objective.value_and_grad`` would give for the whole batch, of the sums over all of its parts.

    Args:
      objective, x, state: as for every `add_part` of the step.
      sums: what the last `add_part` gave.
      key: for an aggregator that asks for one.

    Raises:
      ValueError: a part is missing, or was added twice.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(jr.losses.CrossEntropy(), forward=lambda w, batch: w * batch["logprobs"])
      >>> first, _ = jr.TokenBatch.pack([{"logprobs": [-1.0]}, {"logprobs": [-6.0]}]).split(2)
      >>> jr.finish_parts(objective, jr.add_part(objective, None, jnp.array(1.0), first), jnp.array(1.0))
      Traceback (most recent call last):
      ValueError: finish_parts: 1 datums that count were added, and the whole batch has 2: a part is missing
    """
    if not isinstance(sums, Sums):
        raise TypeError(f"finish_parts takes what add_part gave, got {type(sums).__name__}")
    _check_sums(objective.plan, sums)
    _check_all_there(sums)
    return _finite(objective, objective._run(_finish, x, sums, none_if_empty(state), key))


@functools.lru_cache(maxsize=256, typed=True)
def _program(steps: int, axis_name: Any) -> Callable[..., Result]:
    def accumulated(
        plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None
    ) -> Result:
        check_argument(plan, x)
        fns = plan.fns(leaves)
        named = sorted({name for fn in fns for name in getattr(fn, "reweighted", ())})
        parts = micro_batches(
            batch, steps, rows_together=part_sums.group_of(fns), reweighted=named, axis_name=axis_name
        )
        ask = bind_ask(plan, leaves, state, key)
        if axis_name is not None and ask.norms is not None and ask.norms.per_datum:
            raise ValueError(
                "accumulate: norms a datum are of the device's own rows, and nothing else is, with "
                "axis_name=: compose with GradNorms(per_datum=False)"
            )
        given = x
        x, parts = varying((x, parts), axis_name)
        if key is not None and axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))

        def measured(ask: Ask) -> Pass:
            filled = _filled(plan, leaves, x, parts, batch, key) if _measures_means(ask) else 1.0
            want = _want(plan, leaves, ask)._replace(filled=filled, scanned=True)
            return over_parts(plan, leaves, x, parts, state, key, want, axis_name)

        done = measured(ask) if ask.held is None else _now_and_then(measured, ask)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        terms = bind_terms(plan, leaves, first, state, key, x)
        if done.norms is not None and ask.norms is not None and ask.norms.per_datum:
            done = done._replace(norms=done.norms._replace(per_datum=_rows_of(done.norms.per_datum, batch)))
        out = report(plan, leaves, terms, done, state, ask, given, True)
        return (out.loss_total, out), done.gradient

    return accumulated


def _now_and_then(measured: Callable[[Ask], Pass], ask: Ask) -> Pass:
    """As `jaxreg.core.gradients.differentiate`: one branch measures, and the other carries on."""
    assert ask.held is not None
    held = ask.held
    plain = ask._replace(norms=None, held=None)
    if held.combined is not None:
        raise ValueError(
            "accumulate: an aggregator of the params' gradients that measures now and then, "
            "GradNorms(every=n), is not accumulated: leave every= out, or combine with wrt='outputs'"
        )
    return lax.cond(
        held.fresh,
        lambda: as_held(measured(ask._replace(held=None)), ask),
        lambda: as_held(measured(plain)._replace(norms=held.norms), ask),
    )


def _add(plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None) -> Sums:
    sums, part = batch
    check_argument(plan, x)
    _check_sums(plan, sums)
    want = _want(plan, leaves, bind_ask(plan, leaves, state, key)._replace(held=None))
    states = states_of(plan, leaves, state) if sums is None else sums.states
    terms, model = bound_part(plan, leaves, x, part, with_states(state, states), key)
    here, _ = sums_of(terms, model, x, part, want)
    return here if sums is None else part_sums.added(sums, here, want)


def _finish(plan: Plan, leaves: Leaves, x: PyTree, batch: PyTree, state: PyTree, key: Array | None) -> Result:
    sums = batch
    ask = bind_ask(plan, leaves, state, key)
    terms = bind_terms(plan, leaves, None, state, key)
    done = part_sums.finished(terms, sums, x, _want(plan, leaves, ask), None)
    if ask.held is not None:  # in a loop every step measures
        ask = ask._replace(held=ask.held._replace(fresh=jnp.asarray(True)))
        done = as_held(done, ask)
    out = report(plan, leaves, terms, done, state, ask, x, True)
    return (out.loss_total, out), done.gradient


def _want(plan: Plan, leaves: Leaves, ask: Ask) -> Want:
    return Want(ask, plan.names, plan.model is None, [kinds_of(fn) for fn in plan.fns(leaves)])


def _rows_of(by_term: list[Array | None], batch: PyTree) -> list[Array | None]:
    """Norms a datum of the rows that there were, without those that filled up the last part."""
    count = batch.datums if isinstance(batch, TokenBatch) else _count_rows(batch)
    return [None if own is None else own[:count] for own in by_term]


def _measures_means(ask: Ask) -> bool:
    """Whether mean magnitudes are asked for, which are by how many elements there are."""
    return ask.norms is not None and ask.norms.absolutes


def _filled(plan: Plan, leaves: Leaves, x: PyTree, parts: PyTree, batch: PyTree, key: Array | None) -> float:
    """How many elements the outputs of all parts have, for every one of the batch's."""
    if plan.model is None:
        return 1.0

    def elements(batch: PyTree) -> int:
        forward = bind_forward(plan, leaves, batch, key)
        assert forward is not None
        outputs = jax.eval_shape(lambda x: forward(x)[0], x)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outputs))

    count = len(jax.tree.leaves(parts)[0])
    return count * elements(jax.tree.map(lambda leaf: leaf[0], parts)) / elements(batch)


def _count_rows(batch: PyTree) -> int:
    return batch.shape[0] if isinstance(batch, TokenBatch) else len(jax.tree.leaves(batch)[0])


def _finite(objective: CompositeLoss, done: Result) -> Result:
    if objective.plan.aggregator is not None and not isinstance(done[0][0], jax.core.Tracer):
        refuse_nonfinite(objective.plan.combiner(objective.leaves), done[0][1])
    return done


def _check(objective: CompositeLoss, x: PyTree, batch: PyTree) -> None:
    if not isinstance(objective, CompositeLoss):
        raise TypeError(
            f"accumulate takes an objective, which compose returns, got {type(objective).__name__}"
        )
    if objective.plan.model is None and isinstance(batch, TokenBatch):
        for leaf in jax.tree.leaves(x):
            if jnp.shape(leaf)[:2] == batch.shape:
                raise ValueError(
                    f"accumulate: x has the shape of the batch's tokens, {jnp.shape(leaf)}, so it is "
                    f"outputs, of which each micro-batch has its own: give compose the model, "
                    f"forward=apply_fn, and accumulate the params"
                )


def _check_sums(plan: Plan, sums: Sums | None) -> None:
    """Refuse what parts of another objective added up to."""
    if sums is not None and len(sums.values) != len(plan.names):
        raise ValueError(
            f"add_part, finish_parts: the sums are of another objective, of {len(sums.values)} terms, and "
            f"this one has {len(plan.names)}"
        )


def _check_all_there(sums: Sums) -> None:
    if sums.seen is None or sums.whole is None or isinstance(sums.seen, jax.core.Tracer):
        return
    if sums.alike is not None and not bool(sums.alike):
        raise ValueError("finish_parts: the parts are of several batches: they do not know the same totals")
    for what, own, whole in zip(
        ("datums that count", "real tokens"), np.asarray(sums.seen), np.asarray(sums.whole), strict=True
    ):
        if own != whole:
            raise ValueError(
                f"finish_parts: {own} {what} were added, and the whole batch has {whole}: "
                + ("a part is missing" if own < whole else "a part was added twice, or is of another batch")
            )
