"""Per-term gradients and their norms, at the price of (nearly) one gradient.

Three ways through, chosen when the program is traced:

- **no norms**: one ``value_and_grad`` of the sum, the program that one would write by hand;
- **norms of the outputs' gradient**: one small vjp a term, from the outputs that all terms share; the
  total is their weighted sum, so the model (if there is one) is pulled back through once;
- **norms of the parameters' gradient**: the terms' output cotangents are stacked and the model's one
  pullback is vmapped over the stack, so each weight matrix meets all terms in one large product.

In none of them does a term's backward pass run more than once, and the forward pass is shared. An aggregator
multiplies the terms' weighted gradients by coefficients that it reads off their Gramian: in output space
before the one pullback, in parameter space after the stacked one. Norms that are measured now and then are
one branch of a conditional; the other is the second way without the norms. Each branch runs the model itself:
what its backward pass keeps would otherwise have to be written out at the conditional's door.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxreg.base.types import PyTree
from jaxreg.core.in_outputs import in_outputs
from jaxreg.core.in_params import in_params
from jaxreg.core.passes import Ask, BoundTerm, Forward, Pass, members, total_of
from jaxreg.core.pullback import Model, run_forward
from jaxreg.core.sums import scales_of, weighted_sum, with_params_terms
from jaxreg.core.vjps import term_gradients


def evaluate(terms: Sequence[BoundTerm], forward: Forward | None, x: PyTree) -> Pass:
    """The pass without a gradient."""
    outputs, aux = forward(x) if forward else (x, None)
    return _evaluated(terms, outputs, x)._replace(aux=aux)


def differentiate(terms: Sequence[BoundTerm], forward: Forward | None, x: PyTree, ask: Ask) -> Pass:
    """The pass with the total's gradient with respect to x, and what else is asked for."""
    if ask.norms is None and ask.combine is None:
        return _plain(terms, forward, x)
    if ask.held is None:
        return _measured(terms, run_forward(forward, x), x, ask)
    return lax.cond(
        ask.held.fresh,
        lambda: as_held(_measured(terms, run_forward(forward, x), x, ask), ask),
        lambda: as_held(_between(terms, run_forward(forward, x), x, ask), ask),
    )


def _plain(terms: Sequence[BoundTerm], forward: Forward | None, x: PyTree) -> Pass:
    def total(x: PyTree) -> tuple[Any, Pass]:
        done = evaluate(terms, forward, x)
        return done.total, done

    (_, done), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return done._replace(gradient=gradient)


def _measured(terms: Sequence[BoundTerm], model: Model, x: PyTree, ask: Ask) -> Pass:
    return (in_params if ask.in_params else in_outputs)(terms, model, x, ask)


def _between(terms: Sequence[BoundTerm], model: Model, x: PyTree, ask: Ask) -> Pass:
    """The pass of a step that measures nothing, with what was measured last.

    Every term has its own vjp here, too, so that a term at weight 0 is left out as in the steps that measure.
    """
    assert ask.held is not None
    if (combined := ask.held.combined) is None:
        done = in_outputs(terms, model, x, ask._replace(norms=None, held=None))
        return done._replace(norms=ask.held.norms)
    scales = scales_of(terms, range(len(terms)), combined.coefficients)
    values, extras, gradients = term_gradients(terms, model.outputs, x)
    own = members([term.on_params for term in terms], "outputs")
    cotangent = weighted_sum([scales[i] for i in own], [gradients[i] for i in own], model.outputs)
    gradient = with_params_terms(model.pull(cotangent), terms, scales, gradients)
    total = total_of(terms, values)
    return Pass(total, values, extras, model.aux, gradient, ask.held.norms, combined)


def _evaluated(terms: Sequence[BoundTerm], outputs: PyTree, x: PyTree) -> Pass:
    values, extras = [], []
    for term in terms:
        value, extra = term.fn(x if term.on_params else outputs)
        values.append(value)
        extras.append(extra)
    return Pass(total_of(terms, values), values, extras, None)


def as_held(done: Pass, ask: Ask) -> Pass:
    """What was measured in the dtypes of what is carried from step to step, in which both branches agree."""
    assert ask.held is not None

    def cast(new: PyTree, last: PyTree) -> PyTree:
        return new if last is None else jax.tree.map(lambda a, b: a.astype(b.dtype), new, last)

    return done._replace(
        norms=cast(done.norms, ask.held.norms), combined=cast(done.combined, ask.held.combined)
    )
