"""Per-term gradients and their norms, at the price of (nearly) one gradient.

Three ways through, chosen when the program is traced:

- **no norms**: one ``value_and_grad`` of the sum, the program that one would write by hand;
- **norms of the outputs' gradient**: one small vjp a term, from the outputs that all terms share; the
  total is their weighted sum, so the model (if there is one) is pulled back through once;
- **norms of the parameters' gradient**: the terms' output cotangents are stacked and the model's one
  pullback is vmapped over the stack, so each weight matrix meets all terms in one large product.

In none of them does a term's backward pass run more than once, and the forward pass is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxreg.base.norm import l2_norm
from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.paths import select_leaves
from jaxreg.base.types import Array, PyTree
from jaxreg.core.norms import GradNorms
from jaxreg.core.notes import add_place

Forward: TypeAlias = Callable[[PyTree], tuple[PyTree, PyTree]]  # from params to outputs, and aux


class BoundTerm(NamedTuple):
    """A term that is a function of the differentiated value alone."""

    fn: Callable[[PyTree], tuple[Array, Any]]
    weight: Array | None  # None for the base loss, which has none
    on_params: bool
    whose: str = "term"  # what errors call it


class Norms(NamedTuple):
    """Norms by term, in the terms' order; None for a term that has no gradient in this space."""

    terms: list[Array | None]
    per_datum: list[Array | None]
    total: Array


class Pass(NamedTuple):
    """What one pass gives: the total, every term's value and extras; if asked, gradient and norms."""

    total: Array
    values: list[Array]
    extras: list[Any]
    aux: PyTree  # what the model returned beside its outputs
    gradient: PyTree = None
    norms: Norms | None = None


def weighted(weight: Array | None, value: Array) -> Array:
    """``weight · value`` of a scalar, and 0 at weight 0, though the value be NaN or infinite.

    It is the value that is replaced, so that d/d(weight) stays the value, at weight 0 too.
    """
    if weight is None:
        return value
    scale = weight.astype(value.dtype)
    return scale * jnp.where((scale == 0) & ~jnp.isfinite(value), jnp.zeros_like(value), value)


def evaluate(terms: Sequence[BoundTerm], forward: Forward | None, x: PyTree) -> Pass:
    """The pass without a gradient."""
    outputs, aux = forward(x) if forward else (x, None)
    values, extras = [], []
    for term in terms:
        value, extra = term.fn(x if term.on_params else outputs)
        values.append(value)
        extras.append(extra)
    return Pass(_total(terms, values), values, extras, aux)


def differentiate(
    terms: Sequence[BoundTerm],
    forward: Forward | None,
    x: PyTree,
    norms: GradNorms | None,
) -> Pass:
    """The pass with the total's gradient with respect to x, and the norms that are asked for."""
    if norms is None:
        return _without_norms(terms, forward, x)
    if forward is None or norms.wrt == "outputs":
        return _norms_of_outputs(terms, forward, x, norms)
    return _norms_of_params(terms, forward, x, norms)


def _without_norms(terms: Sequence[BoundTerm], forward: Forward | None, x: PyTree) -> Pass:
    def total(x: PyTree) -> tuple[Array, Pass]:
        done = evaluate(terms, forward, x)
        return done.total, done

    (_, done), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return done._replace(gradient=gradient)


def _norms_of_outputs(
    terms: Sequence[BoundTerm],
    forward: Forward | None,
    x: PyTree,
    norms: GradNorms,
) -> Pass:
    outputs, aux, pull = _run_forward(forward, x)
    values, extras, gradients = _term_gradients(terms, outputs, x)
    on_outputs = [i for i, term in enumerate(terms) if not term.on_params]
    cotangent = _weighted_sum(terms, gradients, on_outputs, outputs)
    gradient = _with_params_terms(pull(cotangent), terms, gradients)

    if norms.per_datum:
        _check_rows(outputs)
    by_term: list[Array | None] = [None] * len(terms)
    by_datum: list[Array | None] = [None] * len(terms)
    for i in on_outputs:
        of_rows = l2_norm(jax.tree.leaves(gradients[i]), keep_leading=norms.per_datum)
        by_term[i] = l2_norm([of_rows]) if norms.per_datum else of_rows
        by_datum[i] = of_rows if norms.per_datum else None
    total = l2_norm(jax.tree.leaves(cotangent))
    return Pass(_total(terms, values), values, extras, aux, gradient, Norms(by_term, by_datum, total))


def _norms_of_params(
    terms: Sequence[BoundTerm],
    forward: Forward,
    params: PyTree,
    norms: GradNorms,
) -> Pass:
    outputs, aux, pull = _run_forward(forward, params)
    values, extras, gradients = _term_gradients(terms, outputs, params)
    on_outputs = [i for i, term in enumerate(terms) if not term.on_params]
    chosen = select_leaves(params, norms.params, "GradNorms(params=...)")

    stack = jax.tree.map(lambda *c: jnp.stack(c), *(gradients[i] for i in on_outputs))
    # Without the barrier XLA may compute each term's gradient again for every product that reads the
    # stack, and hold a transposed copy of it. It saved 15 to 20 % of temporary memory on two small
    # transformers with an untied head, and made no difference on the benchmark's, whose head is tied.
    stack = jax.lax.optimization_barrier(stack)
    stacked = _pulled_together(pull, stack)
    pulled = {i: jax.tree.map(lambda g, k=k: g[k], stacked) for k, i in enumerate(on_outputs)}
    gradient = _weighted_sum(terms, pulled, on_outputs, params)
    if not all(chosen):
        # Only the chosen leaves are pulled back for every term: what follows takes the others from
        # one plain pullback of the weighted sum, so their rows of `stacked` are dead code to XLA.
        rest = pull(_weighted_sum(terms, gradients, on_outputs, outputs))
        gradient = _merge(chosen, gradient, rest)
    gradient = _with_params_terms(gradient, terms, gradients)

    of_stack = l2_norm(_pick(stacked, chosen), keep_leading=True)
    found = {i: of_stack[k] for k, i in enumerate(on_outputs)}
    found |= {i: l2_norm(_pick(gradients[i], chosen)) for i, term in enumerate(terms) if term.on_params}
    by_term: list[Array | None] = [found[i] for i in range(len(terms))]
    total = l2_norm(_pick(gradient, chosen))
    none: list[Array | None] = [None] * len(terms)
    return Pass(_total(terms, values), values, extras, aux, gradient, Norms(by_term, none, total))


def _total(terms: Sequence[BoundTerm], values: Sequence[Array]) -> Array:
    total = values[0]
    for term, value in zip(terms[1:], values[1:], strict=True):
        total = total + weighted(term.weight, value)
    return total


def _run_forward(forward: Forward | None, x: PyTree) -> tuple[PyTree, PyTree, Callable[[PyTree], PyTree]]:
    if forward is None:
        return x, None, lambda cotangent: cotangent
    outputs, pull, aux = jax.vjp(forward, x, has_aux=True)

    def pulled(cotangent: PyTree) -> PyTree:
        try:
            return pull(cotangent)[0]
        except Exception as error:
            add_place(error, "the backward of forward")
            raise

    return outputs, aux, pulled


def _pulled_together(pull: Callable[[PyTree], PyTree], stack: PyTree) -> PyTree:
    """The pullback of every cotangent of a stack, at once."""
    try:
        return jax.vmap(pull)(stack)
    except Exception as error:
        error.add_note(
            "This happened where the norms of the params' gradient vmap the backward of forward over the "
            "terms. If forward's backward cannot be vmapped, use track_grad_norms=GradNorms(wrt='outputs'), "
            "the norms of the outputs' gradient, which runs it once and plain; or let it be vmapped: a "
            "jax.pure_callback in it takes vmap_method='sequential'."
        )
        raise


def _term_gradients(
    terms: Sequence[BoundTerm], outputs: PyTree, params: PyTree
) -> tuple[list[Array], list[Any], list[PyTree]]:
    """One vjp a term. The terms share what they compute alike: XLA merges it."""
    values, extras, gradients = [], [], []
    for term in terms:
        try:
            (value, extra), gradient = jax.value_and_grad(term.fn, has_aux=True)(
                params if term.on_params else outputs
            )
        except Exception as error:
            add_place(error, f"the {term.whose} of the objective")  # its backward, where it says nothing yet
            raise
        values.append(value)
        extras.append(extra)
        gradients.append(gradient)
    return values, extras, gradients


def _weighted_sum(terms: Sequence[BoundTerm], gradients: Any, indices: Sequence[int], like: PyTree) -> PyTree:
    """Σ weightᵢ·gradientᵢ, elementwise and accumulated in float32 (a dot product would run in
    bfloat16 on TPU), without the terms whose weight is 0, though their gradients be NaN."""

    def leaf(like: Array, *parts: Array) -> Array:
        dtype = accumulation_dtype(like.dtype)
        total = jnp.zeros((), dtype)
        for i, part in zip(indices, parts, strict=True):
            weight, wide = terms[i].weight, part.astype(dtype)
            if weight is not None:
                scale = weight.astype(dtype)
                wide = jnp.where(scale == 0, jnp.zeros((), dtype), scale * wide)
            total = total + wide
        return jnp.broadcast_to(total, like.shape).astype(like.dtype)

    return jax.tree.map(leaf, like, *(gradients[i] for i in indices))


def _with_params_terms(gradient: PyTree, terms: Sequence[BoundTerm], gradients: Sequence[PyTree]) -> PyTree:
    """The gradient that came through the model, and that of the terms on the parameters themselves."""
    on_params = [i for i, term in enumerate(terms) if term.on_params]
    if not on_params:
        return gradient
    return jax.tree.map(jnp.add, gradient, _weighted_sum(terms, gradients, on_params, gradient))


def _pick(tree: PyTree, chosen: Sequence[bool]) -> list[Array]:
    return [leaf for leaf, yes in zip(jax.tree.leaves(tree), chosen, strict=True) if yes]


def _merge(chosen: Sequence[bool], a: PyTree, b: PyTree) -> PyTree:
    """The leaves of a that are chosen, and the others of b."""
    pairs = zip(chosen, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.unflatten(jax.tree.structure(a), [x if yes else y for yes, x, y in pairs])


def _check_rows(outputs: PyTree) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "GradNorms(per_datum=True): the outputs' leaves need one leading axis of the same size, "
            f"one row a datum; got shapes {shapes}"
        )
