"""What becomes of each term where the batch is a part of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from jaxreg.base.kinds import MetricKind
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.batch.micro_batches import seen
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import share_of
from jaxreg.core.plan import Leaves, Plan, who
from jaxreg.core.spec import Additive, check_additive

Called = tuple[Array, dict[str, Array], PyTree]  # what call_term gives


def additive_of(plan: Plan, i: int, fn: TermFn) -> Additive | None:
    """What a term, or its spec, says of the parts of a batch."""
    said = plan.additive[i] if plan.additive else None
    if said is None:
        said = getattr(fn, "additive", None)
        check_additive(said, who(plan.names[i]))
    return said


def approximate_terms(plan: Plan, leaves: Leaves) -> tuple[str, ...]:
    """The names of those whose part of a batch is no share of the whole's value."""
    fns = plan.fns(leaves)
    return tuple(n for i, n in enumerate(plan.names) if additive_of(plan, i, fns[i]) == "approximate")


def kinds_of(fn: TermFn) -> Mapping[str, MetricKind]:
    """The kinds of a term's metrics, as far as they are known."""
    kinds: Mapping[str, MetricKind] | None = getattr(fn, "metric_kinds", None)
    return {} if kinds is None else kinds


def of_part(call: Callable[[PyTree], Called], plan: Plan, i: int, fn: TermFn, batch: PyTree) -> Called:
    """The call of a term on a part of a batch, such that the parts' values add up to the whole's.

    Raises:
      ValueError: the term does not say that they do, or says that they do not.
    """
    how = additive_of(plan, i, fn)
    if how is True:
        return call(batch)
    if not how:
        raise ValueError(_refusal(plan.names[i], fn, how))
    share = _share(batch)
    value, metrics, state = call(_as_if_whole(batch))
    own = kinds_of(fn)
    scaled = {name: _shared(metric, own.get(name), share) for name, metric in metrics.items()}
    return value * share.astype(value.dtype), scaled, state


def _refusal(name: str, fn: TermFn, how: Additive | None) -> str:
    said = "the base loss" if who(name) == "base loss" else who(name)
    where = f"{said}: the batch is a part of one (batch.totals)"
    if how is False:
        return (
            f"{where}, and the term says that its parts do not add up to the whole; evaluate it on the "
            f"whole batch, or say additive='approximate' in its spec: the parts' own values, weighted by "
            f"their datums"
        )
    place = "let the function say so, fn.additive = True" if said == "the base loss" else "say additive=True"
    return (
        f"{where}, and the term does not say whether its parts add up to the whole. If it reduces with "
        f"batch.mean, batch.sum and their kin alone, and no function of these, they do: {place}; "
        f"jaxreg.testing.check_term(fn, x, batch, additive=True) tries it. A plain jnp.mean divides by "
        f"the part's own size and does not"
    )


def _share(batch: PyTree) -> Array:
    """Which share of the whole's datums that count are in this part."""
    if isinstance(batch, TokenBatch):
        return batch.share()
    own, whole = seen(batch)
    return share_of(own, whole, getattr(batch["totals"], "parts", 1))


def _as_if_whole(batch: PyTree) -> PyTree:
    if isinstance(batch, TokenBatch):
        return batch.as_local()
    return {name: array for name, array in batch.items() if name != "totals"}


def _shared(metric: Array, kind: MetricKind, share: Array) -> Array:
    if kind == "sum":
        return metric * share.astype(metric.dtype)
    return metric * jnp.sqrt(share).astype(metric.dtype) if kind == "root" else metric
