"""What the caller of a step asks for: which objective of which data, and how it is sent and judged."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.core.compose import as_terms, compose
from jaxreg.core.norms import GradNorms
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.spec import Regularizer, RegularizerSpec, as_spec
from jaxreg.host.callback import HostTerm

Regularizers = Iterable[Regularizer]
REMEMBERED = 64  # objectives composed of a base loss and regularizers=
_STEPS: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


class Ask(NamedTuple):
    """A step, as `forward_backward_custom` describes it."""

    client: Any
    data: Sequence[Any]
    objective: CompositeLoss
    logprobs: Sequence[Any] | None
    state: PyTree
    key: Array | None
    step: int | None
    totals_of: Sequence[Any] | None = None  # all datums of the batch that these are a part of


class Options(NamedTuple):
    """How a step is sent, waited for and judged."""

    top_k: str
    timeout: float | None
    max_drift: float
    on_drift: str
    requests: int = 1  # how many the datums are sent in


def check(client: Any, options: Options) -> None:
    """Refuse what is no client, and options that there are not."""
    for name in ("forward", "forward_backward"):
        if not callable(getattr(client, name, None)):
            raise TypeError(f"client: {type(client).__name__} has no {name}(data, loss_fn)")
    if options.on_drift not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_drift is 'warn', 'raise' or 'ignore', got {options.on_drift!r}")
    if isinstance(options.requests, bool) or not isinstance(options.requests, int) or options.requests < 1:
        raise ValueError(f"requests is a whole number, at least 1; got {options.requests!r}")
    if options.top_k not in ("native", "unrolled"):
        raise ValueError(f"top_k is 'native' or 'unrolled', got {options.top_k!r}")


def as_objective(
    loss: CompositeLoss | TermFn,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
) -> CompositeLoss:
    """The objective itself, or one composed of a base loss and regularizers: the same one every time."""
    if not isinstance(loss, CompositeLoss):
        if isinstance(regularizers, Iterator):
            raise TypeError("regularizers= is an iterator, which gives its terms once: say list(...)")
        specs = tuple(as_spec(spec) for spec in as_terms(regularizers or ()))
        objective = _remembered(loss, specs, track_grad_norms or False)
    elif regularizers is None and track_grad_norms is None:
        objective = loss
    else:
        raise TypeError(
            "regularizers= and track_grad_norms= go with a base loss; this objective is composed "
            "already, so give them to compose"
        )
    if objective.plan.model is not None:
        raise ValueError(
            "the objective has a forward=, but here the server runs the model: compose it without one, so "
            "that its terms get the logprobs"
        )
    return objective


@functools.lru_cache(maxsize=REMEMBERED)
def _composed(loss: TermFn, specs: tuple[RegularizerSpec, ...], norms: bool | GradNorms) -> CompositeLoss:
    return compose(loss, specs, track_grad_norms=norms)


def _remembered(loss: TermFn, specs: tuple[RegularizerSpec, ...], norms: bool | GradNorms) -> CompositeLoss:
    """One that was composed before, if it is known."""
    key = loss, specs, norms
    try:
        hash(key)
    except TypeError:  # a weight may be an array
        return compose(loss, specs, track_grad_norms=norms)
    host = next((spec.fn.regularizer for spec in specs if isinstance(spec.fn, HostTerm)), None)
    if host is None:
        return _composed(*key)
    # It is remembered by its host term: a cache of ours would keep that, and its threads, for ever.
    if len(host.compositions) >= REMEMBERED:
        host.compositions.clear()
    if key not in host.compositions:
        host.compositions[key] = compose(loss, specs, track_grad_norms=norms)
    return host.compositions[key]


def step_of(client: Any, step: int | None) -> int | None:
    """The step that the caller names, or how many this client has taken; None where it cannot be counted."""
    if step is not None:
        return operator.index(step)
    try:
        return next(_STEPS.setdefault(client, itertools.count()))
    except TypeError:  # neither hashed nor weakly referenced
        return None
