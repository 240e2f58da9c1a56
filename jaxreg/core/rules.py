"""The rule of an objective: what it must be, when it fits, and how it moves the weights after a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.shown import called
from jaxreg.base.types import Array, PyTree
from jaxreg.core.norms import GradNorms
from jaxreg.core.notes import add_place
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.spec import RegularizerSpec

REMEDIES = {
    "norms": ("the norms of the terms' gradients", "track_grad_norms=True"),
    "absolutes": ("the magnitudes in the terms' gradients", "track_grad_norms=GradNorms(absolutes=True)"),
}


def bound_rule(rule: Any, specs: tuple[RegularizerSpec, ...], norms: GradNorms | None) -> Any:
    """The rule, knowing the objective's terms.

    Raises:
      TypeError, ValueError, KeyError: it is no rule, moves a term that there is not or that has a schedule,
        or needs what is not measured.
    """
    if isinstance(rule, type) or not all(
        callable(getattr(rule, name, None)) for name in ("bind", "init", "update")
    ):
        raise TypeError(
            f"weighting is a rule of jaxreg.weighting, such as adaptive_kl('kl', target=0.05), or several, "
            f"chain(...); got {rule.__name__ if isinstance(rule, type) else type(rule).__name__}"
        )
    rule = rule.bind(tuple(spec.name for spec in specs))
    scheduled = [spec.name for spec in specs if callable(spec.weight) and spec.name in rule.names]
    if scheduled:
        raise ValueError(
            f"term {scheduled[0]!r}: its weight is a schedule, and the rule {called(rule)} moves it, too; "
            f"give it a number to begin with, or leave it to the schedule"
        )
    for need in sorted(rule.needs):
        what, remedy = REMEDIES[need]
        if norms is None or (need == "absolutes" and not norms.absolutes):
            raise ValueError(f"weighting: {called(rule)} reads {what}: compose with {remedy}")
    return rule


def moved_weights(
    rule: Any, ruled: tuple[str, ...], out: CustomLossOutput, state: PyTree
) -> dict[str, PyTree]:
    """The next step's weights and the rule's next state, of this step's output."""
    # Of its own terms what it chose itself, though an ablation may hold one at another weight in this step.
    weights: dict[str, Array] = {name: term.weight for name, term in out.regularizers.items()}
    weights |= state["weights"]
    out = jax.lax.stop_gradient(_with_something_to_wait_on(rule, out))
    try:
        with jax.named_scope("weighting"):
            chosen, own = rule.update(out, state["rules"], weights)
    except Exception as error:
        add_place(error, f"update() of the weighting {called(rule)} of the objective")
        raise
    _check_names(rule, ruled, chosen)
    like = state["weights"]
    return {"weights": {n: jnp.asarray(chosen[n]).astype(like[n].dtype) for n in ruled}, "rules": own}


def _with_something_to_wait_on(rule: Any, out: CustomLossOutput) -> CustomLossOutput:
    """Where a rule needs norms and this step has none (it took no gradient), norms that are not fresh."""
    if not rule.needs or out.base_loss.grad_norm is not None:
        return out
    nothing = jnp.zeros_like(out.loss_total)
    gone: Any = dict.fromkeys(("grad_norm", "grad_abs_max", "grad_abs_mean"), nothing)
    terms = type(out.regularizers)((name, term.replace(**gone)) for name, term in out.regularizers.items())  # type: ignore[attr-defined]
    base = out.base_loss.replace(**gone)  # type: ignore[attr-defined]
    age = jnp.ones((), jnp.int32)
    return out.replace(base_loss=base, regularizers=terms, norms_age=age)  # type: ignore[attr-defined, no-any-return]


def _check_names(rule: Any, ruled: tuple[str, ...], chosen: Mapping[str, Array]) -> None:
    missing = [name for name in ruled if name not in chosen]
    if missing:
        raise ValueError(
            f"weighting {called(rule)}: it gave no weight for term {missing[0]!r}, which it moves"
        )
