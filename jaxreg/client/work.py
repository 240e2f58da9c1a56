"""What a step evaluates, taken apart and checked; and what comes of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreg.base.types import Array, PyTree
from jaxreg.client.pack import Packed
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.plan import Plan, who
from jaxreg.host.calls import HostCalls
from jaxreg.host.part import part

_SEEN: weakref.WeakKeyDictionary[Plan, set[Any]] = weakref.WeakKeyDictionary()


class Work(NamedTuple):
    """What is compiled, what runs beside it, and what all of them read; made by `prepare`."""

    names: tuple[str, ...]  # of all regularizers, in their order
    compiled: CompositeLoss  # the objective without its host terms
    calls: HostCalls  # these, in this step
    weights: dict[str, np.float32]  # theirs
    packed: Packed
    state: PyTree
    key: Array | None


class Evaluated(NamedTuple):
    """The objective at some logprobs, and d(loss)/d(logprobs), one array [T] or [T, K] a datum."""

    output: CustomLossOutput
    gradients: list[np.ndarray]


def prepare(
    objective: CompositeLoss, packed: Packed, state: PyTree, key: Array | None, step: int | None
) -> Work:
    """Take an objective apart, and try it on the data's shapes: it complains before anything is sent."""
    compiled, host = part(objective)
    scheduled = any(callable(term.weight) for term in host)
    known = objective.weights(state) if scheduled else objective.constants
    weights = {term.name: np.float32(known[term.name]) for term in host}
    calls = HostCalls(host, packed.targets, step)  # whose gradients have the targets' shapes
    work = Work(objective.names, compiled, calls, weights, packed, state, key)
    _check_parts(work, host)
    _check_groups(work)
    _dry_run(work)
    return work


def reweighted_by(objective: CompositeLoss) -> tuple[str, ...]:
    """The arrays of the batch that the objective's terms multiply its weights by."""
    fns = objective.plan.fns(objective.leaves)
    return tuple(sorted({name for fn in fns for name in getattr(fn, "reweighted", ())}))


def _check_parts(work: Work, host: Sequence[Any]) -> None:
    """Refuse host terms that do not say that their parts add up, where the data is a part of a batch."""
    for term in host:
        if work.packed.batch.totals is not None and term.additive is not True:
            raise ValueError(
                f"host term {term.name!r}: the data is a part of a batch (totals_of=), and the term does not "
                f"say that its parts add up to the whole: say HostRegularizer(..., additive=True) where fn "
                f"sums over datums, or send the whole batch in several requests, requests=n"
            )


def _check_groups(work: Work) -> None:
    """Refuse datums that do not come in the groups that a term wants, such as pairs, or only half of one."""
    plan, datums = work.compiled.plan, len(work.packed.data)
    counts = np.any(np.asarray(work.packed.batch.counted), axis=1)[:datums]
    for name, fn in zip(plan.names, plan.fns(work.compiled.leaves), strict=True):
        group = getattr(fn, "rows_together", 1)
        if datums % group:
            raise ValueError(
                f"{who(name)}: {type(fn).__name__} takes datums in groups of {group} (chosen, rejected, "
                f"chosen, ...); got {datums} datums"
            )
        groups = counts.reshape(-1, group)
        if (torn := groups.any(axis=1) & ~groups.all(axis=1)).any():
            first = int(np.argmax(torn)) * group
            raise ValueError(
                f"{who(name)}: {type(fn).__name__} takes datums in groups of {group}, but of the datums "
                f"{first} … {first + group - 1} only some have a token that counts (not masked, and of a "
                f"weight that is not 0); leave the group out"
            )


def _dry_run(work: Work) -> None:
    """Let every term see the names and shapes, once for each of them."""
    objective, batch, state, key = work.compiled, work.packed.batch, work.state, work.key
    x = jax.ShapeDtypeStruct((*batch.shape, *work.packed.targets[0].shape[1:]), np.float32)
    seen = _SEEN.setdefault(objective.plan, set())
    leaves, structure = jax.tree.flatten((objective.leaves, x, batch, state, key))
    signature = structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
    if signature not in seen:
        objective.eval_shape(x, batch, state=state, key=key)
        seen.add(signature)
