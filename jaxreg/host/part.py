"""An objective taken apart into what is compiled and what runs beside it."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from jaxreg.core.objective import CompositeLoss
from jaxreg.core.plan import Plan, shared
from jaxreg.host.callback import HostTerm
from jaxreg.host.regularizer import HostRegularizer


class _Parts(NamedTuple):
    plan: Plan | None  # of what is compiled; None where that is all (a value must not keep its key alive)
    kept: tuple[int, ...]  # which terms that is, the base loss first
    host: tuple[int, ...]  # which terms are left


_PARTS: weakref.WeakKeyDictionary[Plan, _Parts] = weakref.WeakKeyDictionary()


def part(objective: CompositeLoss) -> tuple[CompositeLoss, tuple[HostRegularizer, ...]]:
    """The objective without its host terms, and these."""
    parts = _PARTS.get(objective.plan)
    if parts is None:
        parts = _PARTS[objective.plan] = _parted(objective)
    if parts.plan is None:
        return objective, ()
    leaves = objective.leaves
    names = {parts.plan.names[i] for i in range(1, len(parts.plan.names))}
    kept = leaves._replace(
        constants={name: leaf for name, leaf in leaves.constants.items() if name in names},
        held={name: leaf for name, leaf in leaves.held.items() if name in names},
        terms=tuple(leaves.terms[i] for i in parts.kept),
    )
    fns: Any = objective.plan.fns(leaves)
    host = tuple(fns[i].regularizer for i in parts.host)
    return CompositeLoss(kept, parts.plan), host  # type: ignore[call-arg]


def _parted(objective: CompositeLoss) -> _Parts:
    plan = objective.plan
    fns = plan.fns(objective.leaves)
    kept = tuple(i for i, fn in enumerate(fns) if not isinstance(fn, HostTerm))
    host = tuple(i for i, fn in enumerate(fns) if isinstance(fn, HostTerm))
    if not host or _needs_all_terms(plan):
        return _Parts(None, kept, ())

    def these(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[i] for i in kept)

    lean = shared(
        these(plan.names),
        these(plan.parts),
        these(plan.places),
        these(plan.schedules),
        plan.model,
        plan.norms,
        plan.has_aux,
    )
    return _Parts(lean, kept, host)


def _needs_all_terms(plan: Plan) -> bool:
    """Whether something in the compiled pass reads every term: a Gramian, a rule, norms that are carried.

    Host terms then run inside of it, by callback, and not beside it.
    """
    norms = plan.norms
    carried = norms is not None and (norms.gramian or norms.absolutes or norms.every > 1)
    return carried or plan.weighting is not None or plan.aggregator is not None
