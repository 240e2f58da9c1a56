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

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg._paths import PathFilter, leaf_paths, select_leaves
from jaxreg.spec import Array, PyTree, accumulation_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradNorms:
    """Which gradients the norms are of.

    Args:
      wrt: ``None``, the argument that is differentiated; ``"outputs"``, what ``forward`` produced
        (cheap: one small vjp a term); ``"params"``, exactly in parameter space (one wide pullback).
        Without ``forward`` there is only ``x``, so None and ``"outputs"`` are the same.
      per_datum: also report a norm for every datum: [B], over all axes but the leading one of the
        outputs. Of the outputs' gradient only, and at no extra pass.
      params: only the parameters whose path matches count: a shell pattern (``"*/kernel"``), a
        leading part of the path (``"head"``), a tuple of them, or a function of the path. The rest
        of the pullback is then never computed for the single terms. Hashable.

    A term's gradient has the dtype of what it is differentiated with respect to. Where that is float16,
    scale a term that may leave its range, not its weight: the unweighted gradient has to fit.

    Example:
      >>> import jaxreg as jr
      >>> jr.GradNorms(wrt="params", params="head")
      GradNorms(wrt='params', per_datum=False, params='head')
    """

    wrt: Literal["outputs", "params"] | None = None
    per_datum: bool = False
    params: PathFilter | list[str] | None = None

    def __post_init__(self) -> None:
        if self.wrt not in (None, "outputs", "params"):
            raise ValueError(f"GradNorms: wrt is 'outputs', 'params' or None, got {self.wrt!r}")
        if isinstance(self.params, list):
            object.__setattr__(self, "params", tuple(self.params))
        if self.params is not None and self.wrt == "outputs":
            raise ValueError("GradNorms: a filter on params needs wrt='params', not wrt='outputs'")
        if self.per_datum and self.wrt == "params":
            raise ValueError(
                "GradNorms: per_datum norms are of the outputs' gradient, since a parameter belongs "
                "to no datum; use wrt='outputs'"
            )

    @property
    def path_filter(self) -> PathFilter | None:
        """``params`` as `select_leaves` takes it."""
        assert not isinstance(self.params, list)  # made a tuple above, so that it can be hashed
        return self.params


class Differentiated(NamedTuple):
    """A term and what to differentiate it with respect to."""

    fn: Callable[[PyTree], tuple[Array, Any]]
    weight: Array | None  # None for the base loss, which has none
    on_params: bool


class Norms(NamedTuple):
    """Norms by term, in the terms' order; None for a term that has no gradient in this space."""

    terms: list[Array | None]
    per_datum: list[Array | None]
    total: Array


def weighted(weight: Array | None, value: Array) -> Array:
    """``weight · value`` of a scalar, and 0 at weight 0, though the value be NaN or infinite.

    It is the value that is replaced, so that d/d(weight) stays the value, at weight 0 too.
    """
    if weight is None:
        return value
    scale = weight.astype(value.dtype)
    return scale * jnp.where((scale == 0) & ~jnp.isfinite(value), jnp.zeros_like(value), value)


def evaluate(
    terms: Sequence[Differentiated],
    forward: Callable[[PyTree], PyTree] | None,
    x: PyTree,
) -> tuple[Array, tuple[list[Array], list[Any]]]:
    """The total, every term's value, and what else every term gave."""
    check_differentiable(x, "params" if forward else "x")
    outputs = x
    if forward:
        outputs = forward(x)
        check_differentiable(outputs, "what forward returns")
    values, extras = [], []
    for term in terms:
        value, extra = term.fn(x if term.on_params else outputs)
        values.append(value)
        extras.append(extra)
    total = values[0]
    for term, value in zip(terms[1:], values[1:], strict=True):
        total = total + weighted(term.weight, value)
    return total, (values, extras)


def differentiate(
    terms: Sequence[Differentiated],
    forward: Callable[[PyTree], PyTree] | None,
    x: PyTree,
    norms: GradNorms | None,
) -> tuple[list[Array], list[Any], PyTree, Norms | None]:
    """Every term's value and extras, the total's gradient with respect to x, and the norms."""
    if norms is None:
        # jax checks dtypes itself, but does not know which leaf of whose tree it is.
        check_differentiable(x, "params" if forward else "x")
        (_, (values, extras)), gradient = jax.value_and_grad(
            lambda x: evaluate(terms, forward, x), has_aux=True
        )(x)
        return values, extras, gradient, None
    if forward is None or norms.wrt == "outputs":
        return _norms_of_outputs(terms, forward, x, norms)
    return _norms_of_params(terms, forward, x, norms)


def _norms_of_outputs(
    terms: Sequence[Differentiated],
    forward: Callable[[PyTree], PyTree] | None,
    x: PyTree,
    norms: GradNorms,
) -> tuple[list[Array], list[Any], PyTree, Norms]:
    outputs, pull = _run_forward(forward, x)
    values, extras, gradients = _term_gradients(terms, outputs, x)
    on_outputs = [i for i, term in enumerate(terms) if not term.on_params]
    cotangent = _weighted_sum(terms, gradients, on_outputs, outputs)
    chosen = select_leaves(outputs, norms.path_filter, "GradNorms(params=...)")
    if norms.per_datum:
        _check_rows(outputs)
    squares = {i: _squares(gradients[i], chosen, keep_leading=norms.per_datum) for i in on_outputs}
    total = _root(_squares(cotangent, chosen))
    gradient = pull(cotangent)
    if len(on_outputs) < len(terms):
        on_params = [i for i, term in enumerate(terms) if term.on_params]
        gradient = _add(gradient, _weighted_sum(terms, gradients, on_params, x))
    nones: list[Array | None] = [None] * len(terms)
    by_term, by_datum = list(nones), list(nones)
    for i, square in squares.items():
        by_term[i] = _root(jnp.sum(square))
        by_datum[i] = _root(square) if norms.per_datum else None
    return values, extras, gradient, Norms(by_term, by_datum, total)


def _norms_of_params(
    terms: Sequence[Differentiated],
    forward: Callable[[PyTree], PyTree] | None,
    params: PyTree,
    norms: GradNorms,
) -> tuple[list[Array], list[Any], PyTree, Norms]:
    outputs, pull = _run_forward(forward, params)
    values, extras, gradients = _term_gradients(terms, outputs, params)
    on_outputs = [i for i, term in enumerate(terms) if not term.on_params]
    on_params = [i for i, term in enumerate(terms) if term.on_params]
    chosen = select_leaves(params, norms.path_filter, "GradNorms(params=...)")

    stack = jax.tree.map(lambda *c: jnp.stack(c), *(gradients[i] for i in on_outputs))
    # Without the barrier XLA may compute each term's gradient again for every product that reads the
    # stack, and hold a transposed copy of it. It saved 15 to 20 % of temporary memory on two small
    # transformers with an untied head, and made no difference on the benchmark's, whose head is tied.
    stack = jax.lax.optimization_barrier(stack)
    stacked = jax.vmap(pull)(stack)
    stacked_squares = _squares(stacked, chosen, keep_leading=True)
    squares = {i: stacked_squares[k] for k, i in enumerate(on_outputs)}
    squares |= {i: _squares(gradients[i], chosen) for i in on_params}

    pulled = {i: jax.tree.map(lambda g, k=k: g[k], stacked) for k, i in enumerate(on_outputs)}
    gradient = _weighted_sum(terms, pulled, on_outputs, params)
    if not all(chosen):
        # Only the chosen leaves are pulled back for every term: what follows takes the others from
        # one plain pullback of the weighted sum, so their rows of `stacked` are dead code to XLA.
        rest = pull(_weighted_sum(terms, gradients, on_outputs, outputs))
        gradient = jax.tree.unflatten(
            jax.tree.structure(params),
            [
                a if yes else b
                for a, b, yes in zip(*map(jax.tree.leaves, (gradient, rest)), chosen, strict=True)
            ],
        )
    if on_params:
        gradient = _add(gradient, _weighted_sum(terms, gradients, on_params, params))
    total = _root(_squares(gradient, chosen))
    roots: list[Array | None] = [_root(squares[i]) for i in range(len(terms))]
    return values, extras, gradient, Norms(roots, [None] * len(terms), total)


def _run_forward(
    forward: Callable[[PyTree], PyTree] | None, x: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    check_differentiable(x, "params" if forward else "x")
    if forward is None:
        return x, lambda cotangent: cotangent
    outputs, pull = jax.vjp(forward, x)
    check_differentiable(outputs, "what forward returns")
    return outputs, lambda cotangent: pull(cotangent)[0]


def _term_gradients(
    terms: Sequence[Differentiated], outputs: PyTree, params: PyTree
) -> tuple[list[Array], list[Any], list[PyTree]]:
    """One vjp a term. The terms share what they compute alike: XLA merges it."""
    values, extras, gradients = [], [], []
    for term in terms:
        (value, extra), gradient = jax.value_and_grad(term.fn, has_aux=True)(
            params if term.on_params else outputs
        )
        values.append(value)
        extras.append(extra)
        gradients.append(gradient)
    return values, extras, gradients


def _weighted_sum(
    terms: Sequence[Differentiated], gradients: Any, indices: Sequence[int], like: PyTree
) -> PyTree:
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


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _squares(tree: PyTree, chosen: Sequence[bool], *, keep_leading: bool = False) -> Array:
    """Sum of squares over the chosen leaves: a scalar, or [N] where the leaves are [N, ...]."""
    leaves = [leaf for leaf, yes in zip(jax.tree.leaves(tree), chosen, strict=True) if yes]
    sums = []
    for leaf in leaves:
        array = jnp.asarray(leaf)
        square = jnp.square(array.astype(accumulation_dtype(array.dtype)))
        if array.ndim > 1 + keep_leading:
            square = jnp.sum(square, axis=-1)  # By rows first: CPUs share rows out to their cores.
        sums.append(jnp.sum(square, axis=tuple(range(int(keep_leading), square.ndim))))
    return sum(sums[1:], start=sums[0])


def _check_rows(outputs: PyTree) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "GradNorms(per_datum=True): the outputs' leaves need one leading axis of the same size, "
            f"one row a datum; got shapes {shapes}"
        )


def _root(square: Array) -> Array:
    """The square root, with derivative 0 at 0, so that norms may be differentiated themselves."""
    safe = jnp.where(square == 0, jnp.ones_like(square), square)
    return jnp.where(square == 0, jnp.zeros_like(square), jnp.sqrt(safe))


def check_differentiable(tree: PyTree, what: str) -> None:
    """Refuse a pytree with a leaf that has no gradient, and name the leaf."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{what} has no array in it, so there is nothing to differentiate")
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        where = f"{what}, at {path!r}," if path else what
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise TypeError(
                f"{where} is no array but {type(leaf).__name__}; part the arrays from the rest first "
                f"(nnx.split, equinox.partition) and put them together in forward"
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} has dtype {dtype}, which has no gradient; "
                + (
                    "let forward return floating-point arrays only, and put the others into the batch"
                    if "forward" in what
                    else "differentiate floating-point arrays only, and put the others into the batch or "
                    "close forward over them (nnx.split(model, nnx.Param, ...), equinox.partition)"
                )
            )
