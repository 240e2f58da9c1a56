"""The part of a step that happens here: pack, evaluate and differentiate, check, unpack."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.batch.buckets import coarse_length, coarse_rows
from jaxreg.batch.packing import pad
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.client.errors import NonFiniteGradient
from jaxreg.client.wire import first_nonfinite
from jaxreg.core.compose import compose
from jaxreg.core.norms import GradNorms
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.plan import Plan, who
from jaxreg.core.spec import BASE, Regularizer, RegularizerSpec, as_spec
from jaxreg.events.log import Inputs
from jaxreg.host.callback import HostTerm
from jaxreg.recorder.diagnose import diagnose

_SEEN: weakref.WeakKeyDictionary[Plan, set[Any]] = weakref.WeakKeyDictionary()
Regularizers = Iterable[Regularizer]
REMEMBERED = 64  # objectives composed of a base loss and regularizers=


class Linearized(NamedTuple):
    """The objective at some logprobs, and d(loss)/d(logprobs), one array [T] or [T, K] a datum."""

    output: CustomLossOutput
    gradients: list[np.ndarray]


def as_objective(
    loss: CompositeLoss | TermFn,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
) -> CompositeLoss:
    """The objective itself, or one composed of a base loss and regularizers: the same one every time."""
    if isinstance(loss, CompositeLoss):
        if regularizers is not None or track_grad_norms is not None:
            raise TypeError(
                "regularizers= and track_grad_norms= go with a base loss; this objective is composed "
                "already, so give them to compose"
            )
        objective = loss
    else:
        specs = tuple(as_spec(spec) for spec in regularizers or ())
        objective = _remembered(loss, specs, track_grad_norms or False)
    if objective.plan.model is not None:
        raise ValueError(
            "the objective has a forward=, but here the server runs the model: compose it without one, so "
            "that its terms get the logprobs"
        )
    return objective


def _compose(loss: TermFn, specs: tuple[RegularizerSpec, ...], norms: bool | GradNorms) -> CompositeLoss:
    return compose(loss, specs, track_grad_norms=norms)


_composed = functools.lru_cache(maxsize=REMEMBERED)(_compose)


def _remembered(loss: TermFn, specs: tuple[RegularizerSpec, ...], norms: bool | GradNorms) -> CompositeLoss:
    """One that was composed before, if it is known."""
    if not _is_hashable((loss, specs)):  # a weight may be an array
        return _compose(loss, specs, norms)
    host = next((spec.fn.regularizer for spec in specs if isinstance(spec.fn, HostTerm)), None)
    if host is None:
        return _composed(loss, specs, norms)
    # It is remembered by its host term: a cache of ours would keep that, and its threads, for ever.
    if len(host.compositions) >= REMEMBERED:
        host.compositions.clear()
    key = loss, specs, norms
    if key not in host.compositions:
        host.compositions[key] = _compose(*key)
    return host.compositions[key]


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def packed(rows: Sequence[Any]) -> TokenBatch:
    """The datums as a batch of one of a few sizes: the model runs elsewhere, so padding is cheap here."""
    return TokenBatch.pack(rows, length_buckets=coarse_length, row_buckets=coarse_rows)


def check_groups(objective: CompositeLoss, batch: TokenBatch, datums: int) -> None:
    """Refuse datums that do not come in the groups that a term wants, such as pairs, or only half of one."""
    counts = np.asarray(batch.counted).any(axis=1)[:datums]
    for name, fn in zip(objective.plan.names, objective.plan.fns(objective.leaves), strict=True):
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


def dry_run(
    objective: CompositeLoss, batch: TokenBatch, like: Sequence[np.ndarray], state: PyTree, key: Array | None
) -> None:
    """Let every term see the names and shapes, so that it complains before anything is sent."""
    x = jax.ShapeDtypeStruct((*batch.shape, *like[0].shape[1:]), np.float32)
    seen = _SEEN.setdefault(objective.plan, set())
    leaves, structure = jax.tree.flatten((objective.leaves, x, batch, state, key))
    signature = structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
    if signature not in seen:
        objective.eval_shape(x, batch, state=state, key=key)
        seen.add(signature)


def linearize(
    objective: CompositeLoss,
    batch: TokenBatch,
    logprobs: Sequence[np.ndarray],
    state: PyTree,
    key: Array | None,
) -> Linearized:
    """Evaluate and differentiate the objective at ragged logprobs.

    Raises:
      NonFiniteGradient: naming the terms, and the first datum and token.
    """
    x = pad(logprobs, *batch.shape)
    (_, output), gradient = objective.value_and_grad(x, batch, state=state, key=key)
    host = np.asarray(gradient)
    gradients = batch.unpack(host)  # without padding, where a term may have left what it likes
    if not np.isfinite(host).all() and (found := first_nonfinite(gradients)):
        i, at, number = found
        findings = diagnose(Inputs(objective, x, batch, state, key))  # it compiles, but only after a failure
        terms = tuple(dict.fromkeys(f.term for f in findings if f.where == "gradient" and f.term))
        guilty = " and ".join("the base loss" if name == BASE else f"term {name!r}" for name in terms)
        raise NonFiniteGradient(
            f"d(loss)/d(logprobs) of datum {i} at {at} is {number}; it comes from "
            f"{guilty or 'the weighted sum: the gradient of each term alone is finite'}",
            terms=terms,
            datum=i,
        )
    return Linearized(output, gradients)


def drift_between(
    batch: TokenBatch, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Mean and maximum of |after − before| over the tokens that count."""
    gap = np.abs(pad(after, *batch.shape).astype(np.float64) - pad(before, *batch.shape))
    weights = np.asarray(batch.weights)
    weights = weights.reshape(weights.shape + (1,) * (gap.ndim - weights.ndim))
    counted = gap[np.broadcast_to(weights != 0, gap.shape)]
    return (float(counted.mean()), float(counted.max())) if counted.size else (0.0, 0.0)
