"""The inner products of the terms' gradients, at any scale.

A gradient's square is out of float32's range long before the gradient is. So each is divided by a power of
two near its own norm first, which loses no digit, and what is multiplied afterwards are the norms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.base.norm import real_parts
from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array

MOST_PAIRED = 32  # vectors, which are 496 pairs
PLAIN_EXPONENT = 40  # norms from 2^-40 to 2^40, whose entries' squares float32 holds with all digits


def power_of_two(norm: Array) -> Array:
    """The power of two at or below a norm, exactly; 1 where the norm is 0 or not finite."""
    limit = jnp.finfo(norm.dtype).maxexp - 2  # its inverse is no subnormal number either
    norm = lax.stop_gradient(norm)
    usable = jnp.isfinite(norm) & (norm > 0)
    _, exponent = jnp.frexp(jnp.where(usable, norm, jnp.ones_like(norm)))
    return jnp.ldexp(jnp.ones_like(norm), jnp.clip(exponent - 1, -limit, limit))


def inner_products(rows: Sequence[Array]) -> Array:
    """[K, K]: the inner products of K vectors whose parts are the leaves, each [K, ...]; of complex ones the
    real part, which is what a step along one changes in the other."""
    parts = real_parts(rows)
    total = _added([_contracted(part, part, 1) for part in parts])
    return (total + total.T) / 2


def products_of_trees(trees: Sequence[object], norms: Array) -> tuple[Array, Array]:
    """[K, K]: the inner products of K trees of norms [K], each divided by a scale; and the scales [K].

    On a CPU, where a product of few long rows is slow and so is making a stack of them, it is a product a
    pair, of the trees as they are, as long as their squares are well within float32's range.
    """

    def stack(*trees: object) -> tuple[Array, Array]:
        return inner_products(stacked(trees, scales)), scales

    def pairs(*trees: object) -> tuple[Array, Array]:
        parts = [real_parts(jax.tree.leaves(tree)) for tree in trees]
        found = {(i, i): jnp.square(norms[i]) for i in range(count)}
        for i, j in itertools.combinations(range(count), 2):
            found[i, j] = found[j, i] = _product(parts[i], parts[j])
        rows = [jnp.stack([found[i, j] for j in range(count)]) for i in range(count)]
        return jnp.stack(rows), jnp.ones_like(scales)

    def on_cpu(*trees: object) -> tuple[Array, Array]:
        near = jnp.all((scales >= 2.0**-PLAIN_EXPONENT) & (scales <= 2.0**PLAIN_EXPONENT))
        return lax.cond(near, pairs, stack, *trees)

    count, scales = len(trees), power_of_two(norms)
    if count > MOST_PAIRED:
        return stack(*trees)
    return lax.platform_dependent(*trees, cpu=on_cpu, default=stack)


def _product(left: Sequence[Array], right: Sequence[Array]) -> Array:
    return _added([_contracted(a, b, 0) for a, b in zip(left, right, strict=True)])


def _added(products: Sequence[Array]) -> Array:
    return sum(products[1:], start=products[0])  # in their own dtype, whatever the default is


def _contracted(left: Array, right: Array, keep: int) -> Array:
    """The sum over all axes from ``keep`` on, which are not flattened: they may be sharded."""
    axes = tuple(range(keep, left.ndim))
    # HIGHEST: a TPU would multiply in bfloat16.
    return lax.dot_general(left, right, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST)


def gramian(products: Array, scales: Array, norms: Array, weights: Sequence[Array | None]) -> Array:
    """[K, K]: the inner products of the weighted gradients.

    Args:
      products: [K, K], of the gradients, each divided by its scale.
      scales: [K], powers of two.
      norms: [K], of the gradients, whose squares the diagonal is.
      weights: of the terms; None is 1. The row of a weight of 0 is 0, though its gradient be NaN.
    """
    dtype = products.dtype
    own = jnp.stack([jnp.ones((), dtype) if w is None else w.astype(dtype) for w in weights])
    zero = own == 0
    either = zero[:, None] | zero[None, :]
    sizes = own * scales.astype(dtype)
    found = jnp.where(either, 0, products * sizes[:, None] * sizes[None, :])
    squares = jnp.where(zero, 0, jnp.square(own * norms.astype(dtype)))
    return jnp.where(jnp.eye(len(weights), dtype=bool), squares[:, None], found)


def cosines(gram: Array) -> Array:
    """[..., K, K]: the cosines of the angles; 1 on the diagonal, and 0 beside a gradient that is 0."""
    norms = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    rows, columns = (
        jnp.broadcast_to(side, gram.shape) for side in (norms[..., :, None], norms[..., None, :])
    )
    zero = (rows == 0) | (columns == 0)
    # One division after the other: the product of two norms may leave the range.
    ratio = gram / jnp.where(zero, 1, rows) / jnp.where(zero, 1, columns)
    diagonal = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=bool), gram.shape) & ~jnp.isnan(ratio)
    return jnp.where(diagonal, 1, jnp.where(zero, 0, jnp.clip(ratio, -1, 1)))


def stacked(trees: Sequence[object], scales: Array) -> list[Array]:
    """The leaves of K trees, each tree divided by its scale, stacked to [K, ...]."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    return [
        jnp.stack([_divided(part, scales[k]) for k, part in enumerate(parts)])
        for parts in zip(*leaves, strict=True)
    ]


def _divided(part: Array, scale: Array) -> Array:
    wide = part.astype(accumulation_dtype(part.dtype))
    return (wide * (1 / scale).astype(jnp.finfo(wide.dtype).dtype)).astype(part.dtype)
