"""What adds up over the parts of a batch: values, gradients, squares of norms, and metrics by their kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.base.kinds import MetricKind
from jaxreg.base.norm import absolutes, l2_norm
from jaxreg.base.numbers import accumulation_dtype, safe_root
from jaxreg.base.paths import select_leaves
from jaxreg.base.types import Array, PyTree
from jaxreg.core.gramian import gramian, products_of_trees
from jaxreg.core.in_outputs import in_outputs, outputs_gramian
from jaxreg.core.norms import GradNorms
from jaxreg.core.part_metrics import (
    ADDED,
    divisor,
    merged,
    over_axis,
    root_of_squares,
    saturated_psum,
    saturated_sum,
    whole_metrics,
)
from jaxreg.core.passes import Ask, BoundTerm, Norms, Pass, members, total_of
from jaxreg.core.pullback import Model, pull_rows
from jaxreg.core.sums import scales_of, weighted_sum, with_params_terms
from jaxreg.core.vjps import term_gradients


class Sums(NamedTuple):
    """What was added up so far. Which fields there are depends on what is measured, and on nothing else."""

    values: list[Array]
    metrics: list[dict[str, Array]]  # those whose kind is known
    states: dict[str, PyTree]  # of stateful terms, after the last part
    gradient: PyTree = None  # of the weighted sum; of leaves that `rows` has not
    rows: list[PyTree] | None = None  # by term, its own gradient, as a list of the chosen leaves
    norms: list[Array] | None = None  # of the terms on outputs, where parts have outputs of their own
    total: Array | None = None
    absolutes: list[tuple[Array, Array]] | None = None
    gramian: Array | None = None  # of the outputs' gradients
    parts: Array | None = None  # how many
    seen: Array | None = None  # datums that count and real tokens (or equal parts), [2], so far
    whole: Array | None = None  # and in the whole batch
    alike: Array | None = None  # whether all parts say the same of that


class Want(NamedTuple):
    """What is to be added up, for an ask."""

    ask: Ask
    names: tuple[str, ...]  # of the terms, the base loss first
    shared: bool  # whether x is the parts' own outputs (False) or what all of them share (True: no model)
    kinds: list[Mapping[str, MetricKind]]
    filled: float = 1.0  # how many rows all parts have, with what fills up the last, for one of the whole
    scanned: bool = False  # whether all parts are at hand, so that they can be gone through again

    @property
    def twice(self) -> bool:
        """Whether a first pass finds the Gramian, and a second one pulls the combination back."""
        return self.scanned and self.ask.combines("outputs") and not (self.shared or self.ask.in_params)

    @property
    def rows(self) -> bool:
        """Whether every term's own gradient is to be held."""
        measures = self.ask.norms is not None or self.ask.combine is not None
        combines = self.ask.combine is not None and not self.twice
        return measures and (self.ask.in_params or combines or self.shared)

    @property
    def outputs_gramian(self) -> bool:
        """Whether the Gramian is that of the outputs' gradients, of which every part has its own."""
        norms = self.ask.norms
        tracked = norms is not None and norms.gramian and self.ask.space == "outputs"
        return not self.shared and (tracked or self.ask.combines("outputs"))


def of_part(terms: Sequence[BoundTerm], model: Model, x: PyTree, want: Want) -> tuple[Sums, PyTree]:
    """One part's own sums, and its norms a datum, where they are wanted."""
    if want.rows:
        return _with_rows(terms, model, x, want), None
    if want.ask.norms is not None or want.twice:
        norms = want.ask.norms or GradNorms()
        if want.twice:
            norms = dataclasses.replace(norms, gramian=True)
        done = in_outputs(terms, model, x, want.ask._replace(norms=norms, combine=None))
        assert done.norms is not None
        own = members([term.on_params for term in terms], "outputs")
        found = [done.norms.terms[i] for i in own]
        sizes = [done.norms.absolutes[i] for i in own] if norms.absolutes else None
        sums = plain(done.values, done.extras, want)._replace(
            gradient=None if want.twice else _wide(done.gradient),
            norms=found,  # type: ignore[arg-type]
            total=done.norms.total,
            absolutes=sizes,  # type: ignore[arg-type]
            gramian=done.norms.gramian,
        )
        return sums, [done.norms.per_datum[i] for i in own] if norms.per_datum else None
    values, extras, gradient = _total_gradient(terms, model, x)
    return plain(values, extras, want)._replace(gradient=_wide(gradient)), None


def of_combined_part(
    terms: Sequence[BoundTerm], model: Model, x: PyTree, want: Want, coefficients: Array
) -> Sums:
    """What one part adds to the gradient, now that an aggregator has said how the terms' are combined."""
    _, extras, gradients = term_gradients(terms, model.outputs, x)
    own = _members(terms, "outputs")
    scales = scales_of(terms, own, coefficients)
    cotangent = weighted_sum([scales[i] for i in own], [gradients[i] for i in own], model.outputs)
    gradient = with_params_terms(model.pull(cotangent), terms, scales, gradients)
    states = _moved(extras, want)
    total = l2_norm(jax.tree.leaves(cotangent))
    return Sums([], [{} for _ in want.kinds], states, gradient=_wide(gradient), total=total)


def _total_gradient(
    terms: Sequence[BoundTerm], model: Model, x: PyTree
) -> tuple[list[Array], list[Any], PyTree]:
    """The gradient of the weighted sum, by one vjp through all terms and the model."""

    def total(outputs: PyTree, params: PyTree) -> tuple[Array, tuple[list[Array], list[Any]]]:
        found = [term.fn(params if term.on_params else outputs) for term in terms]
        values = [value for value, _ in found]
        return total_of(terms, values), (values, [extra for _, extra in found])

    on_params = any(term.on_params for term in terms)
    numbers = (0, 1) if on_params else (0,)
    (_, (values, extras)), slopes = jax.value_and_grad(total, numbers, has_aux=True)(model.outputs, x)
    gradient = model.pull(slopes[0])
    return values, extras, jax.tree.map(jnp.add, gradient, slopes[1]) if on_params else gradient


def plain(values: list[Array], extras: list[Any], want: Want) -> Sums:
    """What one part adds, but for gradients: the values, and the metrics whose kind is known."""
    metrics = [
        {n: metric for n, metric in extra[0].items() if kinds.get(n) in ADDED}
        for extra, kinds in zip(extras, want.kinds, strict=True)
    ]
    return Sums(list(values), metrics, _moved(extras, want), parts=jnp.ones((), jnp.int32))


def _moved(extras: list[Any], want: Want) -> dict[str, PyTree]:
    """The states that terms gave."""
    named = zip(want.names, extras, strict=True)
    return {name: extra[1] for name, extra in named if extra[1] is not None}


def _with_rows(terms: Sequence[BoundTerm], model: Model, x: PyTree, want: Want) -> Sums:
    values, extras, gradients = term_gradients(terms, model.outputs, x)
    on_outputs = members([term.on_params for term in terms], "outputs")
    norms = want.ask.norms or GradNorms()
    chosen = _chosen(x, want)
    cotangents = [gradients[i] for i in on_outputs]
    stack = lax.optimization_barrier(jax.tree.map(lambda *c: jnp.stack(c), *cotangents))
    pulled = pull_rows(model.pull, stack, norms.chunk_size)
    rows: list[PyTree] = []
    for i in range(len(terms)):
        whole = gradients[i]
        if i in on_outputs:
            k = on_outputs.index(i)
            whole = jax.tree.map(lambda leaf, k=k: leaf[k], pulled)
        rows.append([_wide(leaf) for leaf, yes in zip(jax.tree.leaves(whole), chosen, strict=True) if yes])
    sums = plain(values, extras, want)._replace(rows=rows)
    scales = scales_of(terms, range(len(terms)), None)
    if not all(chosen):
        own = weighted_sum([scales[i] for i in on_outputs], cotangents, model.outputs)
        rest = with_params_terms(model.pull(own), terms, scales, gradients)
        leaves = zip(jax.tree.leaves(rest), chosen, strict=True)
        sums = sums._replace(gradient=[_wide(leaf) for leaf, yes in leaves if not yes])
    if want.ask.norms is not None and want.ask.space == "outputs" and not want.shared:
        total = weighted_sum([scales[i] for i in on_outputs], cotangents, model.outputs)
        sums = sums._replace(
            norms=[l2_norm(jax.tree.leaves(gradients[i])) for i in on_outputs],
            total=l2_norm(jax.tree.leaves(total)),
            absolutes=[absolutes(jax.tree.leaves(gradients[i])) for i in on_outputs]
            if norms.absolutes
            else None,
        )
    if want.outputs_gramian:
        sizes = [l2_norm(jax.tree.leaves(gradients[i])) for i in on_outputs]
        sums = sums._replace(gramian=outputs_gramian(terms, gradients, on_outputs, sizes))
    return sums


def _chosen(x: PyTree, want: Want) -> list[bool]:
    """Which leaves every term's own gradient is held of."""
    if want.ask.combine is not None or want.ask.norms is None:
        return [True] * len(jax.tree.leaves(x))
    return list(select_leaves(x, want.ask.norms.params, "GradNorms(params=...)"))


def nothing(like: Sums, want: Want) -> Sums:
    """What sums begin with, of the shapes of one part's."""
    zeros: Sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    first = {"max": -jnp.inf, "min": jnp.inf}
    metrics = [
        {n: jnp.full_like(m, first.get(str(kinds.get(n)), 0)) for n, m in own.items()}
        for own, kinds in zip(zeros.metrics, want.kinds, strict=True)
    ]
    alike = None if like.alike is None else jnp.asarray(True)
    return zeros._replace(metrics=metrics, alike=alike)


def added(a: Sums, b: Sums, want: Want) -> Sums:
    """Both."""
    metrics = [
        {n: merged(m, theirs[n], kinds.get(n)) for n, m in ours.items()}
        for ours, theirs, kinds in zip(a.metrics, b.metrics, want.kinds, strict=True)
    ]
    return Sums(
        values=[saturated_sum(m, n) for m, n in zip(a.values, b.values, strict=True)],
        metrics=metrics,
        states=b.states,
        gradient=_add(a.gradient, b.gradient),
        rows=_add(a.rows, b.rows),
        norms=None
        if a.norms is None
        else [root_of_squares(m, n) for m, n in zip(a.norms, b.norms or (), strict=True)],
        total=None if a.total is None or b.total is None else root_of_squares(a.total, b.total),
        absolutes=None
        if a.absolutes is None
        else [
            (jnp.maximum(m[0], n[0]), m[1] + n[1])
            for m, n in zip(a.absolutes, b.absolutes or (), strict=True)
        ],
        gramian=_add(a.gramian, b.gramian),
        parts=_add(a.parts, b.parts),
        seen=_add(a.seen, b.seen),
        whole=b.whole,
        alike=None if a.alike is None else a.alike & ((a.parts == 0) | jnp.all(a.whole == b.whole)),
    )


def over_devices(sums: Sums, want: Want, axis_name: Any) -> Sums:
    """The sums of all devices of a mesh axis."""
    metrics = [
        {n: over_axis(m, kinds.get(n), axis_name) for n, m in own.items()}
        for own, kinds in zip(sums.metrics, want.kinds, strict=True)
    ]
    added_up = (sums.gradient, sums.rows, sums.gramian, sums.parts, sums.seen)
    gradient, rows, gram, parts, seen = lax.psum(added_up, axis_name)
    sizes = sums.absolutes
    if sizes is not None:
        sizes = [(lax.pmax(most, axis_name), lax.psum(mean, axis_name)) for most, mean in sizes]
    return Sums(
        values=[saturated_psum(value, axis_name) for value in sums.values],
        metrics=metrics,
        states=sums.states,
        gradient=gradient,
        rows=rows,
        norms=None if sums.norms is None else [over_axis(n, "root", axis_name) for n in sums.norms],
        total=None if sums.total is None else over_axis(sums.total, "root", axis_name),
        absolutes=sizes,
        gramian=gram,
        parts=parts,
        seen=seen,
        whole=None if sums.whole is None else lax.pmax(sums.whole, axis_name),
    )


def finished(terms: Sequence[BoundTerm], sums: Sums, x: PyTree, want: Want, per_datum: PyTree) -> Pass:
    """The pass over the whole batch that the sums of all of its parts are."""
    ask, like = want.ask, jax.tree.leaves(x)
    extras = [
        (whole_metrics(own, kinds), sums.states.get(name))
        for name, own, kinds in zip(want.names, sums.metrics, want.kinds, strict=True)
    ]
    done = Pass(total_of(terms, sums.values), sums.values, extras, None)
    if sums.rows is None:
        gradient = _narrow(sums.gradient, x)
        norms = None if ask.norms is None else _outputs_norms(terms, sums, want, per_datum)
        return done._replace(gradient=gradient, norms=norms)

    space, rows = ask.space, sums.rows
    of_params = space == "params" or want.shared
    combined = None
    if ask.combine is not None:
        combined = ask.combine.solve(_gramian_for(terms, sums, want, ask.combine.space))
    scales = scales_of(terms, range(len(terms)), None)
    if ask.combine is not None and combined is not None:
        scales = scales_of(terms, _members(terms, ask.combine.space), combined.coefficients)
    chosen = _chosen(x, want)
    held = [leaf for leaf, yes in zip(like, chosen, strict=True) if yes]
    weighted = weighted_sum(scales, rows, held)
    gradient = jax.tree.unflatten(jax.tree.structure(x), _in_place(weighted, sums.gradient, like, chosen))
    done = done._replace(gradient=gradient, combined=combined)
    if ask.norms is None:
        return done
    if not of_params:
        measured = _outputs_norms(terms, sums, want, None)
        if combined is not None and ask.combines("outputs"):
            measured = measured._replace(total=_combined_length(combined.gramian, combined.coefficients))
        return done._replace(norms=measured)
    # An aggregator needs whole rows; what is measured of them is what the norms' filter names.
    named = select_leaves(x, ask.norms.params, "GradNorms(params=...)")
    among = [yes for yes, held in zip(named, chosen, strict=True) if held]
    rows = [[leaf for leaf, yes in zip(row, among, strict=True) if yes] for row in rows]
    total = l2_norm([leaf for leaf, yes in zip(weighted, among, strict=True) if yes])
    by_term: list[Array | None] = [l2_norm(row) for row in rows]
    sized = [absolutes(row) if ask.norms.absolutes else None for row in rows]
    none: list[Array | None] = [None] * len(terms)
    gram = _rows_gramian(terms, rows, list(range(len(rows)))) if ask.norms.gramian else None
    return done._replace(norms=Norms(by_term, none, list(sized), total, gram))


def _members(terms: Sequence[BoundTerm], space: Any) -> list[int]:
    return members([term.on_params for term in terms], space)


def _gramian_for(terms: Sequence[BoundTerm], sums: Sums, want: Want, space: Any) -> Array:
    if space == "outputs" and not want.shared:
        assert sums.gramian is not None
        return sums.gramian
    assert sums.rows is not None
    return _rows_gramian(terms, sums.rows, _members(terms, space))


def _rows_gramian(terms: Sequence[BoundTerm], rows: list[PyTree], own: list[int]) -> Array:
    sizes = jnp.stack([l2_norm(rows[i]) for i in own])
    products, scales = products_of_trees([rows[i] for i in own], sizes)
    return gramian(products, scales, sizes, [terms[i].weight for i in own])


def _outputs_norms(terms: Sequence[BoundTerm], sums: Sums, want: Want, per_datum: PyTree) -> Norms:
    """What was measured of the outputs' gradients, in the order of all terms."""
    own = _members(terms, "outputs")
    by_term: list[Array | None] = [None] * len(terms)
    by_datum: list[Array | None] = [None] * len(terms)
    sizes: list[tuple[Array, Array] | None] = [None] * len(terms)
    for k, i in enumerate(own):
        by_term[i] = (sums.norms or [])[k]
        if per_datum is not None:
            by_datum[i] = per_datum[k]
        if sums.absolutes is not None:
            most, means = sums.absolutes[k]
            sizes[i] = (most, means * want.filled / jnp.asarray(sums.parts, means.dtype))
    assert sums.total is not None
    tracked = want.ask.norms is not None and want.ask.norms.gramian
    return Norms(by_term, by_datum, sizes, sums.total, sums.gramian if tracked else None)


def _combined_length(gram: Array, coefficients: Array) -> Array:
    """The length of the combination of gradients whose Gramian this is, which no part has by itself."""
    size = divisor(jnp.max(jnp.abs(jnp.diagonal(gram))))
    square = jnp.sum(coefficients[:, None] * coefficients[None, :] * (gram / size))
    return jnp.sqrt(size) * safe_root(jnp.maximum(square, 0))


def _in_place(chosen_leaves: Any, others: Any, like: list[Array], chosen: list[bool]) -> list[Array]:
    first, rest = iter(chosen_leaves), iter(others or ())
    return [
        (next(first) if yes else next(rest)).astype(jnp.result_type(leaf))
        for leaf, yes in zip(like, chosen, strict=True)
    ]


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), tree)


def _narrow(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, x: leaf.astype(jnp.result_type(x)), tree, like)


def group_of(fns: Sequence[Any]) -> int:
    """How many rows belong together for all terms."""
    return math.lcm(*(getattr(fn, "rows_together", 1) for fn in fns))
