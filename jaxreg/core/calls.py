"""What objective this thread calls, and what a program for it would be compiled for."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxreg.base.shown import described
from jaxreg.core.plan import Plan, who


class Signature(NamedTuple):
    """What a program is compiled for. Hashes and strings, so that it keeps nothing alive."""

    functions: dict[str, int]  # by what they are called
    leaves: dict[str, str]  # by path: float32[4, 128]


@dataclasses.dataclass(frozen=True)
class Traced:
    """An objective that became a part of somebody else's program."""

    at: float
    plan: Plan
    signature: Signature  # read at once: a tracer does not outlive the call
    around: set[str] = dataclasses.field(default_factory=set)  # the programs that it may be inside of


class Running(threading.local):
    """What this thread is doing, for who listens."""

    arguments: tuple[Plan, Any] | None = None  # of the objective that is being called
    traced: Traced | None = None  # the last one that was traced and not compiled yet


running = Running()


@contextlib.contextmanager
def calling(plan: Plan, arguments: Any, traced: bool) -> Iterator[None]:
    """An objective is called with these arguments; ``traced``, inside a program of somebody else's."""
    if traced:
        running.traced = Traced(time.time(), plan, signature_of(plan, arguments))
        yield
        return
    before, running.arguments = running.arguments, (plan, arguments)
    try:
        yield
    finally:
        running.arguments = before


def signature_of(plan: Plan, arguments: Any) -> Signature:
    """What decides whether a compiled program fits: the functions, and every array's shape and dtype."""
    functions = {who(name): hash((plan.parts[i], plan.places[i])) for i, name in enumerate(plan.names)}
    functions |= {
        f"the schedule of term {name!r}": hash(schedule)
        for name, schedule in zip(plan.names, plan.schedules, strict=True)
        if schedule is not None
    }
    functions |= {"forward": hash(plan.model), "track_grad_norms": hash(plan.norms)}
    functions |= {"weighting": hash((plan.weighting, plan.ruled)), "aggregator": hash(plan.aggregator)}
    named = dict(zip(("objective", "x", "batch", "state", "key"), arguments, strict=False))
    leaves = {
        "".join((key.key, jax.tree_util.keystr(tuple(path)))): described(leaf)
        for (key, *path), leaf in jax.tree_util.tree_leaves_with_path(named)
    }
    return Signature(functions, leaves)
