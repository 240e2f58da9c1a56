"""The aggregator of an objective: what it must be, and what it makes of a Gramian.

It is a function from a Gramian [K, K] to coefficients [K], or has a ``solve(gramian, *, key, state)`` that
gives ``(coefficients, metrics, state)``, such as those of `jaxreg.aggregation`.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.shown import called
from jaxreg.base.types import Array, Place, PyTree
from jaxreg.core.norms import GradNorms
from jaxreg.core.notes import add_place
from jaxreg.core.passes import Combined

DIFFERENTIATED = (
    "an objective with an aggregator has a gradient that is not that of its loss_total, so jax.grad and "
    "jax.value_and_grad cannot give it: call objective.value_and_grad(x, batch), which returns "
    "((loss_total, output), gradient); without aggregator= the plain sum is differentiated"
)


def check_aggregator(aggregator: Any, norms: GradNorms | None, forward: object) -> None:
    """Refuse what is no aggregator, or one that does not fit what is measured."""
    if isinstance(aggregator, type):
        raise TypeError(f"aggregator is an instance: write aggregator={aggregator.__name__}()")
    if not callable(aggregator):
        raise TypeError(
            f"aggregator is a function from a Gramian [K, K] to coefficients [K], such as "
            f"jaxreg.aggregation.UPGrad(); got {type(aggregator).__name__}"
        )
    name, wrt = called(aggregator), getattr(aggregator, "wrt", None)
    if wrt not in (None, "outputs", "params"):
        raise ValueError(f"aggregator {name}: wrt is 'outputs', 'params' or None, got {wrt!r}")
    if wrt != "params":
        return
    if forward is None:
        raise ValueError(
            f"aggregator {name}: wrt='params' needs to know the model: give compose forward=apply_fn; "
            f"without it the gradients are those with respect to x, which is wrt='outputs'"
        )
    if norms is not None and norms.space(forward) == "outputs":
        raise ValueError(
            f"aggregator {name}: it combines the params' gradients, and track_grad_norms={norms!r} measures "
            f"the outputs': say one space for both"
        )
    if norms is not None and norms.params is not None:
        raise ValueError(
            f"aggregator {name}: its coefficients multiply whole gradients, and GradNorms(params="
            f"{norms.params!r}) measures a part of them: leave params= out, or combine with wrt='outputs'"
        )


def combine_space(aggregator: Any) -> Place:
    """Whose gradients an aggregator combines."""
    return "params" if getattr(aggregator, "wrt", None) == "params" else "outputs"


def has_state(aggregator: Any) -> bool:
    """Whether it carries something from step to step."""
    return bool(getattr(aggregator, "stateful", False))


def solve(aggregator: Any, gramian: Array, key: Array | None, state: PyTree) -> Combined:
    """What the aggregator makes of a Gramian, checked."""
    name, count = called(aggregator), gramian.shape[0]
    if getattr(aggregator, "needs_key", False) and key is None:
        raise ValueError(f"aggregator {name}: it asks for a random key: pass key=jax.random.key(seed)")
    gramian = jax.lax.stop_gradient(gramian)
    with jax.named_scope("aggregator"):
        try:
            if hasattr(aggregator, "solve"):
                found, metrics, following = aggregator.solve(gramian, key=key, state=state)
            else:
                found, metrics, following = aggregator(gramian), {}, None
        except Exception as error:
            add_place(error, f"the aggregator {name} of the objective")
            raise
    coefficients = jnp.asarray(found)
    if coefficients.shape != (count,):
        raise ValueError(
            f"aggregator {name}: of a Gramian [{count}, {count}] it makes coefficients [{count}], got shape "
            f"{coefficients.shape}"
        )
    if state is not None:  # in the dtypes of its first state, which every step's has
        following = jax.tree.map(lambda new, last: jnp.asarray(new).astype(last.dtype), following, state)
    return Combined(coefficients.astype(gramian.dtype), dict(metrics), following, gramian)


def refuse_nonfinite(aggregator: Any, out: Any) -> None:
    """Where the aggregator says ``nonfinite="raise"``: name the terms whose gradients are not finite."""
    if getattr(aggregator, "nonfinite", None) != "raise":
        return
    if np.isfinite([np.asarray(own) for own in out.aggregation.coefficients.values()]).all():
        return
    squares = np.diagonal(np.asarray(out.gramian))
    bad = [name for name, own in zip(out.gramian_terms, squares, strict=True) if not np.isfinite(own)]
    raise FloatingPointError(
        f"aggregator {called(aggregator)}: the gradients of {', '.join(map(repr, bad)) or 'some terms'} are "
        f"not finite; nonfinite='drop' takes the plain sum of the others, and 'propagate' gives NaN"
    )


@jax.custom_jvp
def not_differentiable(total: Array) -> Array:
    """The total of an objective with an aggregator, as it is; but it refuses to be differentiated."""
    return total


@not_differentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError(DIFFERENTIATED)


def whose_gradients(aggregator: Any, names: tuple[str, ...], on_params: list[bool]) -> str:
    """What is combined, and what is added to it, for people."""
    if combine_space(aggregator) == "params":
        return "of the params' gradients of all terms"
    beside = [name for name, params in zip(names, on_params, strict=True) if params]
    rest = f"; those of {', '.join(beside)}, on params, are added" if beside else ""
    return f"of the outputs' gradients{rest}"


def as_numbers(held: Any) -> Any:
    """A rule or an aggregator whose numbers are arrays, so that changing one compiles nothing."""

    def leaf(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(
            value, float | int | np.generic | np.ndarray | jax.Array
        ):
            return value
        if jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return jnp.asarray(value, jnp.result_type(float))
        return jnp.asarray(value, jnp.int32) if isinstance(value, int) else jnp.asarray(value)

    return cast(Any, jax.tree.map(leaf, held))
