"""Terms in, one pure function out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxreg.base.types import Place, PyTree, TermFn
from jaxreg.core.aggregate import as_numbers, check_aggregator
from jaxreg.core.norms import GradNorms, as_grad_norms
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.plan import Leaves, shared, who
from jaxreg.core.rules import bound_rule
from jaxreg.core.spec import (
    BASE,
    Regularizer,
    RegularizerSpec,
    StaticPart,
    as_spec,
    check_term,
    own_place,
    split_arrays,
)
from jaxreg.core.weights import check_schedule, weight_leaf


class MixedReductionsWarning(UserWarning):
    """Some terms of an objective sum over tokens, and others average."""


def compose(
    loss_fn: TermFn,
    regularizers: Iterable[Regularizer] = (),
    *,
    forward: Callable[..., PyTree] | None = None,
    has_aux: bool = False,
    track_grad_norms: bool | GradNorms = False,
    weighting: Any = None,
    aggregator: Any = None,
) -> CompositeLoss:
    """Compose one base loss and any number of weighted terms into one objective.

    ``loss_total = base + Σ weightᵢ·valueᵢ``.

    Args:
      loss_fn: the base loss, ``fn(x, batch) -> value`` or ``(value, metrics)``.
      regularizers: each a `RegularizerSpec`, a mapping with the keys ``fn``, ``weight`` and ``name``, or a
        `jaxreg.host.HostRegularizer`.
      forward: the model, ``forward(params, batch) -> outputs``; the objective then takes params, the
        base loss and the terms on ``"outputs"`` get the outputs, those on ``"params"`` (weight decay says
        so by itself) the params. Without it they all get x, whatever that is. It may take ``key`` by
        keyword, for dropout or sampling, and gets its own: the call's ``key=`` folded with its name,
        ``jax.random.fold_in(key, zlib.crc32(b"/forward") & 0x7FFFFFFF)``. Every term that asks for ``key``
        gets its own the same way, by the term's name (the base loss is ``base_loss``), so that adding or
        dropping a term changes nobody else's. Give each step another: ``fold_in(key, step)``.
      has_aux: ``forward`` returns ``(outputs, aux)``, as `jax.grad` has it. What is no output (batch-norm
        statistics, counters, caches; leaves of any dtype) comes back in ``out.aux``, without a gradient.
      track_grad_norms: True for the L2 norm of every term's gradient with respect to the argument
        that is differentiated, or a `GradNorms` that says more.
      weighting: a rule of `jaxreg.weighting` (several with ``chain``), which moves the weights of the terms
        that it names from step to step, beginning with the weights given here. Carry
        ``state=objective.init()``, then ``state=out.state``.
      aggregator: what replaces the plain sum of the weighted gradients: an aggregator of
        `jaxreg.aggregation`, or a function from their Gramian [K, K], the base loss first, to coefficients
        [K].
        By default it combines the outputs' gradients, and terms on params are added as they are; with
        ``wrt="params"`` those of all terms at the params. ``loss_total`` stays the plain sum, whose gradient
        this is not, so `jax.grad` of the objective raises: use ``objective.value_and_grad``.

    Returns:
      A `CompositeLoss`: a pure function and a pytree, compiled when it is called eagerly.

    Raises:
      TypeError, ValueError: naming the term and the remedy.

    Warns:
      MixedReductionsWarning: some terms sum over tokens (``reduction="token_sum"``) and others average.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> def nll(logprobs, batch):
      ...     return -jnp.mean(logprobs)
      >>> def l1(logprobs, batch):
      ...     return jnp.mean(jnp.abs(logprobs)), {"max": jnp.max(jnp.abs(logprobs))}
      >>> objective = jr.compose(
      ...     nll, [jr.RegularizerSpec(name="l1", fn=l1, weight=0.5)], track_grad_norms=True)
      >>> (loss, out), grads = objective.value_and_grad(jnp.array([-1.0, -3.0]))
      >>> loss.item(), out.regularizers["l1"].value.item(), grads.tolist()
      (3.0, 2.0, [-0.75, -0.75])
    """
    if not callable(loss_fn):
        raise TypeError(
            f"compose needs a base loss first, a function of (x, batch), then the regularizers; got "
            f"{'None' if loss_fn is None else type(loss_fn).__name__}"
        )
    check_term(loss_fn, "base loss")
    specs = tuple(as_spec(spec) for spec in as_terms(regularizers))
    _check_names(specs)
    _check_reductions(loss_fn, specs)
    _check_forward(forward, has_aux, loss_fn, specs)
    for spec in specs:
        if callable(spec.weight):
            check_schedule(spec.weight, spec.name)
    norms = as_grad_norms(track_grad_norms)
    if norms is not None:
        norms.check_fits(forward)
    rule: StaticPart | None = None
    ruled: tuple[str, ...] = ()
    moved: tuple[Any, ...] = ()
    if weighting is not None:
        bound = bound_rule(weighting, specs, norms)
        ruled = tuple(spec.name for spec in specs if spec.name in bound.names)
        rule, moved = split_arrays(as_numbers(bound), "weighting")
    combiner: StaticPart | None = None
    numbers: tuple[Any, ...] = ()
    if aggregator is not None:
        check_aggregator(aggregator, norms, forward)
        combiner, numbers = split_arrays(as_numbers(aggregator), "aggregator")

    parts, arrays = [], []
    names = [BASE, *(spec.name for spec in specs)]
    for name, fn in zip(names, [loss_fn, *(spec.fn for spec in specs)], strict=True):
        static, held = split_arrays(fn, who(name))
        parts.append(static)
        arrays.append(held)
    model, model_arrays = (None, ()) if forward is None else split_arrays(forward, "forward")
    places: tuple[Place, ...] = ("outputs", *(spec.on or "outputs" for spec in specs))
    schedules = (None, *(s.weight if callable(s.weight) else None for s in specs))
    leaves = Leaves(
        constants={s.name: weight_leaf(0.0 if callable(s.weight) else s.weight) for s in specs},
        held={s.name: jnp.asarray(False) for s in specs if callable(s.weight) or s.name in ruled},
        terms=tuple(arrays),
        model=model_arrays,
        weighting=moved,
        aggregator=numbers,
    )
    additive = (None, *(spec.additive for spec in specs))
    said = additive if any(own is not None for own in additive) else ()
    plan = shared(
        tuple(names), tuple(parts), places, schedules, model, norms, has_aux, rule, ruled, combiner, said
    )
    return CompositeLoss(leaves, plan)


def as_terms(regularizers: Any) -> Iterable[Any]:
    """The regularizers, if they are a sequence of terms, or what gives them one after the other."""
    one = isinstance(regularizers, RegularizerSpec) or callable(getattr(regularizers, "as_spec", None))
    if one or (isinstance(regularizers, Mapping) and "fn" in regularizers):
        raise TypeError("regularizers is a sequence of terms; put this one term into a list")
    if isinstance(regularizers, str | Mapping) or not isinstance(regularizers, Iterable):
        raise TypeError(
            f"regularizers is a sequence of RegularizerSpecs, got {type(regularizers).__name__}"
            + (
                "; give its values, each of which says its own name"
                if isinstance(regularizers, Mapping)
                else ""
            )
        )
    return regularizers


def _check_names(specs: Sequence[RegularizerSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"two terms are named {spec.name!r}; every term needs its own name")
        seen.add(spec.name)


def _check_reductions(loss_fn: TermFn, specs: Sequence[RegularizerSpec]) -> None:
    """Tell where some terms sum over tokens and others average: their shares then move with the batch."""
    named = [(BASE, loss_fn), *((spec.name, spec.fn) for spec in specs)]
    sums, means = (
        [who(name) for name, fn in named if getattr(fn, "reduction", None) in some]
        for some in (("token_sum",), ("token_mean", "datum_mean"))
    )
    if sums and means:
        warnings.warn(
            f"{', '.join(sums)} {'sums' if len(sums) == 1 else 'sum'} over tokens, and {', '.join(means)} "
            f"{'averages' if len(means) == 1 else 'average'}: the larger the batch, the less the averages "
            f"count beside the sums. Give all one reduction=, such as 'token_mean'",
            MixedReductionsWarning,
            stacklevel=3,
        )


def _check_forward(forward: object, has_aux: bool, loss_fn: TermFn, specs: Sequence[RegularizerSpec]) -> None:
    if forward is None:
        if has_aux:
            raise ValueError(
                "has_aux=True says what forward returns; give compose the model, forward=apply_fn"
            )
        for spec in specs:
            if spec.on == "params" and own_place(spec.fn) != "params":
                raise ValueError(
                    f"term {spec.name!r}: on='params' parts params from outputs, so it needs the model: "
                    f"give compose forward=apply_fn; without it every term gets x; where x already is "
                    f"the params, leave on= out"
                )
        return
    if not callable(forward):
        raise TypeError(f"forward is a function of (params, batch), got {type(forward).__name__}")
    check_term(forward, "forward")
    if own_place(loss_fn) == "params":
        raise ValueError(
            f"the base loss is of what forward gives, but {type(loss_fn).__name__} is a term on parameters: "
            f"put it among the regularizers, or leave forward out"
        )
