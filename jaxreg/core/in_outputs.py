"""The pass whose terms are measured and combined at the outputs: the model is pulled back through once."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxreg.base.norm import absolutes, l2_norm
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.segments import Segments, largest_of, spread, summed
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
    packed = ask.segments if rows else None
    if rows and packed is None:
        _check_rows(model.outputs)
    found = [jax.tree.leaves(gradients[i]) for i in own] if ask.norms else []
    of_rows = [
        _of_segments(leaves, packed) if packed else l2_norm(leaves, keep_leading=rows) for leaves in found
    ]
    if packed:  # a token of no datum may have a gradient, too
        norms = [l2_norm(leaves) for leaves in found]
    else:
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


def _of_segments(leaves: Sequence[Array], segments: Segments) -> Array:
    """[N]: the norms of each datum's gradients, of leaves [B, T, ...] or [N, ...]."""
    tokens, datums = [], []
    for leaf in leaves:
        if leaf.shape[:2] == segments.ids.shape:
            tokens.append(leaf.reshape(-1, *leaf.shape[2:]))
        elif leaf.shape[:1] == (segments.number,):
            datums.append(leaf)
        else:
            raise ValueError(
                f"GradNorms(per_datum=True): of rows that hold several datums the outputs' leaves are "
                f"[B, T, ...] or one row a datum, [N, ...]; with (B, T) = {segments.ids.shape} and N = "
                f"{segments.number} one has shape {leaf.shape}"
            )
    own = [l2_norm(datums, keep_leading=True)] if datums else []
    if tokens:
        each = l2_norm(tokens, keep_leading=True).reshape(segments.ids.shape)
        size = largest_of(each, segments)
        size = jnp.where((size > 0) & (size < jnp.inf), size, jnp.ones_like(size))
        squares = jnp.square(each / spread(size, segments, each.shape[1]))
        own.append(size * jnp.sqrt(summed(jnp.where(segments.ids > 0, squares, 0), segments)))
    return l2_norm([jnp.stack(own, axis=1)], keep_leading=True) if len(own) > 1 else own[0]


def _check_rows(outputs: PyTree) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "GradNorms(per_datum=True): the outputs' leaves need one leading axis of the same size, "
            f"one row a datum; got shapes {shapes}"
        )
