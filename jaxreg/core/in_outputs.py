"""The pass whose terms are measured and combined at the outputs: the model is pulled back through once."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxreg.base.norm import absolutes, l2_norm
from jaxreg.base.types import Array, PyTree
from jaxreg.core.gramian import gramian, products_of_trees
from jaxreg.core.passes import Ask, BoundTerm, Norms, Pass, members, total_of
from jaxreg.core.pullback import Model
from jaxreg.core.sums import scales_of, weighted_sum, with_params_terms
from jaxreg.core.vjps import term_gradients


def in_outputs(terms: Sequence[BoundTerm], model: Model, x: PyTree, ask: Ask) -> Pass:
    """The pass with the total's gradient, and what is asked for of the outputs' gradients."""
    values, extras, gradients = term_gradients(terms, model.outputs, x)
    own = members([term.on_params for term in terms], "outputs")
    rows = bool(ask.norms and ask.norms.per_datum)
    if rows:
        _check_rows(model.outputs)
    of_rows = [l2_norm(jax.tree.leaves(gradients[i]), keep_leading=rows) for i in own] if ask.norms else []
    norms = [l2_norm([norm]) for norm in of_rows] if rows else of_rows

    gram = None
    if ask.combines("outputs") or (ask.norms and ask.norms.gramian):
        sizes = norms or [l2_norm(jax.tree.leaves(gradients[i])) for i in own]
        gram = outputs_gramian(terms, gradients, own, sizes)
    combined = None
    if ask.combines("outputs"):
        assert ask.combine is not None
        assert gram is not None
        combined = ask.combine.solve(gram)
    scales = scales_of(terms, own, None if combined is None else combined.coefficients)
    cotangent = weighted_sum([scales[i] for i in own], [gradients[i] for i in own], model.outputs)
    gradient = with_params_terms(model.pull(cotangent), terms, scales, gradients)
    done = Pass(total_of(terms, values), values, extras, model.aux, gradient, combined=combined)
    if ask.norms is None:
        return done

    by_term: list[Array | None] = [None] * len(terms)
    by_datum: list[Array | None] = [None] * len(terms)
    sizes_of: list[tuple[Array, Array] | None] = [None] * len(terms)
    for k, i in enumerate(own):
        by_term[i] = norms[k]
        by_datum[i] = of_rows[k] if rows else None
        sizes_of[i] = absolutes(jax.tree.leaves(gradients[i])) if ask.norms.absolutes else None
    total = l2_norm(jax.tree.leaves(cotangent))
    kept = gram if ask.norms.gramian else None
    return done._replace(norms=Norms(by_term, by_datum, sizes_of, total, kept))


def outputs_gramian(
    terms: Sequence[BoundTerm], gradients: Sequence[PyTree], own: Sequence[int], norms: Sequence[Array]
) -> Array:
    """[M, M]: the inner products of the weighted gradients of the terms on outputs."""
    sizes = jnp.stack(norms)
    products, scales = products_of_trees([gradients[i] for i in own], sizes)
    return gramian(products, scales, sizes, [terms[i].weight for i in own])


def _check_rows(outputs: PyTree) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "GradNorms(per_datum=True): the outputs' leaves need one leading axis of the same size, "
            f"one row a datum; got shapes {shapes}"
        )
