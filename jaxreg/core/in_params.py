"""The pass whose terms are measured at the params: every term's gradient is pulled back through the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.base.norm import absolutes, l2_norm
from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.paths import select_leaves
from jaxreg.base.types import Array, PyTree
from jaxreg.core.gramian import gramian, inner_products, power_of_two, stacked
from jaxreg.core.in_outputs import outputs_gramian
from jaxreg.core.norms import GradNorms
from jaxreg.core.passes import Ask, BoundTerm, Norms, Pass, members, total_of
from jaxreg.core.pullback import Model, in_order, pull_rows, scan_chunks
from jaxreg.core.sums import scales_of, weighted_sum, with_params_terms
from jaxreg.core.vjps import term_gradients


class Rows(NamedTuple):
    """What is measured of the gradients that came through the model, one row a term."""

    norms: Array  # [M]
    absolutes: tuple[Array, Array] | None  # [M] each
    gradient: PyTree = None  # their weighted sum, as far as leaves are chosen
    pulled: PyTree = None  # themselves, [M, ...] a leaf


def in_params(terms: Sequence[BoundTerm], model: Model, params: PyTree, ask: Ask) -> Pass:
    """The pass with the total's gradient, and what is asked for of the params' gradients."""
    values, extras, gradients = term_gradients(terms, model.outputs, params)
    on_outputs = members([term.on_params for term in terms], "outputs")
    norms = ask.norms or GradNorms()
    chosen = select_leaves(params, norms.params, "GradNorms(params=...)")

    combined, coefficients = None, None
    if ask.combines("outputs"):
        assert ask.combine is not None
        sizes = [l2_norm(jax.tree.leaves(gradients[i])) for i in on_outputs]
        combined = ask.combine.solve(outputs_gramian(terms, gradients, on_outputs, sizes))
        coefficients = combined.coefficients
    scales = scales_of(terms, on_outputs, coefficients)
    cotangents = [gradients[i] for i in on_outputs]

    gram = None
    if norms.gramian or ask.combines("params"):
        rows, gram, back = _with_gramian(terms, model, gradients, scales, norms, chosen, params)
    else:
        stack = jax.tree.map(lambda *c: jnp.stack(c), *cotangents)
        rows = _rows(model, stack, [scales[i] for i in on_outputs], norms, chosen, params)

    gradient = rows.gradient
    if ask.combines("params"):
        assert ask.combine is not None
        assert gram is not None
        combined = ask.combine.solve(gram)
        scales = scales_of(terms, range(len(terms)), combined.coefficients)
        again = [_times(scales[i], back[k]) for k, i in enumerate(on_outputs)]
        gradient = weighted_sum(again, _unstacked(rows.pulled, len(again)), params)
    elif not all(chosen):
        # Only the chosen leaves are pulled back for every term: what follows takes the others from
        # one plain pullback of the weighted sum, so their rows are dead code to XLA.
        rest = model.pull(weighted_sum([scales[i] for i in on_outputs], cotangents, model.outputs))
        gradient = _merge(chosen, gradient, rest)
    gradient = with_params_terms(gradient, terms, scales, gradients)
    done = Pass(total_of(terms, values), values, extras, model.aux, gradient, combined=combined)
    if ask.norms is None:
        return done

    by_term: list[Array | None] = [None] * len(terms)
    sizes_of: list[tuple[Array, Array] | None] = [None] * len(terms)
    for i, term in enumerate(terms):
        if term.on_params:
            leaves = _pick(gradients[i], chosen)
            by_term[i] = l2_norm(leaves)
            sizes_of[i] = absolutes(leaves) if norms.absolutes else None
        else:
            k = on_outputs.index(i)
            by_term[i] = rows.norms[k]
            sizes_of[i] = (rows.absolutes[0][k], rows.absolutes[1][k]) if rows.absolutes else None
    none: list[Array | None] = [None] * len(terms)
    total = l2_norm(_pick(gradient, chosen))
    kept = gram if norms.gramian else None
    return done._replace(norms=Norms(by_term, none, sizes_of, total, kept))


def _rows(
    model: Model,
    stack: PyTree,
    scales: Sequence[Array | None],
    norms: GradNorms,
    chosen: Sequence[bool],
    params: PyTree,
    keep: bool = False,
) -> Rows:
    """Every cotangent of the stack pulled back, measured, and added up."""
    # Without the barrier XLA may compute each term's gradient again for every product that reads the
    # stack, and hold a transposed copy of it. It saved 15 to 20 % of temporary memory on two small
    # transformers with an untied head, and made no difference on the benchmark's, whose head is tied.
    stack = jax.lax.optimization_barrier(stack)
    if norms.chunk_size is not None and not keep:
        return _rows_in_chunks(model, stack, scales, norms, chosen, params)
    pulled = pull_rows(model.pull, stack, norms.chunk_size)
    leaves = _pick(pulled, chosen)
    return Rows(
        l2_norm(leaves, keep_leading=True),
        absolutes(leaves, keep_leading=True) if norms.absolutes else None,
        weighted_sum(scales, _unstacked(pulled, len(scales)), params),
        pulled,
    )


def _rows_in_chunks(
    model: Model,
    stack: PyTree,
    scales: Sequence[Array | None],
    norms: GradNorms,
    chosen: Sequence[bool],
    params: PyTree,
) -> Rows:
    """The same, a few terms at a time: no more than a chunk of gradients and their sum is held."""
    assert norms.chunk_size is not None
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)), params)
    plain = jnp.result_type(float)
    weights = jnp.stack([jnp.ones((), plain) if s is None else s.astype(plain) for s in scales])

    def add(total: PyTree, pulled: PyTree, weights: Array) -> tuple[PyTree, Rows]:
        here = weighted_sum(list(weights), _unstacked(pulled, len(weights)), total)
        total = jax.tree.map(jnp.add, total, here)
        leaves = _pick(pulled, chosen)
        sizes = absolutes(leaves, keep_leading=True) if norms.absolutes else None
        return total, Rows(l2_norm(leaves, keep_leading=True), sizes)

    gradient, rows = scan_chunks(add, wide, model.pull, stack, norms.chunk_size, weights)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1)[: len(scales)], rows)
    cast = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), gradient, params)
    return Rows(rows.norms, rows.absolutes, cast)


def _with_gramian(
    terms: Sequence[BoundTerm],
    model: Model,
    gradients: Sequence[PyTree],
    scales: Sequence[Array | None],
    norms: GradNorms,
    chosen: Sequence[bool],
    params: PyTree,
) -> tuple[Rows, Array, Array]:
    """The same, and the inner products with one another and with the terms on params.

    Each cotangent is divided by a power of two near its norm, so that what comes back has the model's own
    scale, whatever the term's is. The last result is these powers, [M], of the rows that were pulled back.
    """
    on_outputs = [i for i, term in enumerate(terms) if not term.on_params]
    on_params = [i for i, term in enumerate(terms) if term.on_params]
    cotangents = [gradients[i] for i in on_outputs]
    sizes = power_of_two(jnp.stack([l2_norm(jax.tree.leaves(tree)) for tree in cotangents]))
    structure = jax.tree.structure(model.outputs)
    stack = jax.tree.unflatten(structure, stacked(cotangents, sizes))
    back = [_times(scales[i], sizes[k]) for k, i in enumerate(on_outputs)]
    rows = _rows(model, stack, back, norms, chosen, params, keep=True)

    every = [_pick(rows.pulled, chosen)]
    lengths, found = [rows.norms * sizes.astype(rows.norms.dtype)], [sizes]
    if on_params:
        own = [_pick(gradients[i], chosen) for i in on_params]
        lengths.append(jnp.stack([l2_norm(leaves) for leaves in own]))
        found.append(power_of_two(lengths[1]))
        every.append(stacked(own, found[1]))
    order = [*on_outputs, *on_params]
    products = inner_products(in_order(every, order))
    dtype = products.dtype
    (lengths_in_order,) = in_order([[length.astype(dtype)] for length in lengths], order)
    (found_in_order,) = in_order([[scale.astype(dtype)] for scale in found], order)
    weights = [term.weight for term in terms]
    gram = gramian(products, found_in_order, lengths_in_order, weights)
    sized = None
    if rows.absolutes:
        largest, mean = rows.absolutes
        sized = (largest * sizes.astype(largest.dtype), mean * sizes.astype(mean.dtype))
    return rows._replace(norms=lengths[0], absolutes=sized), gram, sizes


def _times(scale: Array | None, size: Array) -> Array:
    return size if scale is None else scale * size


def _unstacked(stack: PyTree, count: int) -> list[PyTree]:
    """The trees of a stack [K, ...] a leaf."""
    return [jax.tree.map(lambda leaf, k=k: leaf[k], stack) for k in range(count)]


def _pick(tree: PyTree, chosen: Sequence[bool]) -> list[Array]:
    return [leaf for leaf, yes in zip(jax.tree.leaves(tree), chosen, strict=True) if yes]


def _merge(chosen: Sequence[bool], a: PyTree, b: PyTree) -> PyTree:
    """The leaves of a that are chosen, and the others of b."""
    pairs = zip(chosen, jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.unflatten(jax.tree.structure(a), [x if yes else y for yes, x, y in pairs])
