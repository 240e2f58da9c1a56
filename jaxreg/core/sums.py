"""Weighted sums of gradients that are pytrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import accumulation_dtype
from jaxreg.base.types import Array, PyTree
from jaxreg.core.passes import BoundTerm


def scales_of(terms: Sequence[BoundTerm], indices: Sequence[int], coefficients: Array | None) -> list[Any]:
    """What each term's gradient is multiplied by: its weight, times its coefficient where it has one."""
    scales: list[Array | None] = [term.weight for term in terms]
    if coefficients is not None:
        for k, i in enumerate(indices):
            weight, own = scales[i], coefficients[k]
            scales[i] = own if weight is None else jnp.where(weight == 0, 0, weight * own)
    return scales


def weighted_sum(scales: Sequence[Array | None], gradients: Sequence[PyTree], like: PyTree) -> PyTree:
    """Σ scaleᵢ·gradientᵢ, elementwise and accumulated in float32 (a dot product would run in
    bfloat16 on TPU), without the terms whose scale is 0, though their gradients be NaN. None is 1."""

    def leaf(like: Array, *parts: Array) -> Array:
        dtype = accumulation_dtype(like.dtype)
        return jnp.broadcast_to(_sum(scales, parts, dtype), like.shape).astype(like.dtype)

    return jax.tree.map(leaf, like, *gradients)


def _sum(scales: Sequence[Array | None], parts: Sequence[Array], dtype: Any) -> Array:
    total = jnp.zeros((), dtype)
    for scale, part in zip(scales, parts, strict=True):
        wide = part.astype(dtype)
        if scale is not None:
            own = scale.astype(dtype)
            wide = jnp.where(own == 0, jnp.zeros((), dtype), own * wide)
        total = total + wide
    return total


def with_params_terms(
    gradient: PyTree, terms: Sequence[BoundTerm], scales: Sequence[Array | None], gradients: Sequence[PyTree]
) -> PyTree:
    """The gradient that came through the model, and that of the terms on the parameters themselves."""
    on_params = [i for i, term in enumerate(terms) if term.on_params]
    if not on_params:
        return gradient
    own = weighted_sum([scales[i] for i in on_params], [gradients[i] for i in on_params], gradient)
    return jax.tree.map(jnp.add, gradient, own)
