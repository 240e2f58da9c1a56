"""What every term keeps, whatever it reads: finite numbers, pure, and a gradient that is its value's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.testing.subject import Subject, finite, float64, of, shaped, where


def finite_numbers(term: Subject) -> Iterator[str]:
    """On the example itself."""
    value, metrics = term.reported(term.x, term.batch)
    if not np.isfinite(value):
        yield f"finite value: it is {float(value)}"
    for name, metric in metrics.items():
        if not np.isfinite(metric):
            yield f"finite metrics: {name!r} is {float(metric)}"
    for path, leaf in zip(term.paths(), term.answer(term.x, term.batch).gradient, strict=True):
        if not finite(leaf).all():
            place = f"{where(~finite(leaf))}{of(path)}"
            yield f"finite gradient: it is not {place} (the usual cause: sqrt, a norm or log of 0)"


def transformations(term: Subject) -> Iterator[str]:
    """The value and the metrics are the same inside jit and vmap."""
    plain, answer = term.reported(term.x, term.batch), term.answer(term.x, term.batch)
    jitted = jax.tree.map(np.float32, (answer.value, answer.metrics))
    if not _same(jitted, plain):
        yield (
            f"same under jit: {_shown(jitted)} with, {_shown(plain)} without; a term is a pure function of "
            f"its arguments"
        )
    nudges = [
        jax.tree.map(lambda a: a + 0.01 * term.rng.normal(size=a.shape).astype(a.dtype), term.x)
        for _ in range(3)
    ]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *nudges)
    mapped = jax.vmap(term.reported, in_axes=(0, None))(stack, term.batch)
    for i, nudge in enumerate(nudges):
        one, alone = jax.tree.map(lambda a, i=i: a[i], mapped), term.reported(nudge, term.batch)
        if not _same(one, alone):
            yield f"same under vmap: {_shown(one)} with, {_shown(alone)} without"
            break


def numerical_gradient(term: Subject) -> Iterator[str]:
    """Along random directions, one leaf at a time, in float64 for this block alone."""
    with jax.enable_x64(True):
        wide, batch = float64(term.x), float64(term.batch)
        gradient = term.answer(wide, batch).gradient
        leaves: list[Array]
        treedef: Any
        leaves, treedef = jax.tree.flatten(wide)
        mask = np.asarray(term.batch.mask) if isinstance(term.batch, TokenBatch) else None
        for i, path in enumerate(term.paths()):
            direction = term.rng.normal(size=leaves[i].shape)
            if jnp.iscomplexobj(leaves[i]):
                direction = direction + 1j * term.rng.normal(size=leaves[i].shape)
            if mask is not None and direction.shape[:2] == mask.shape:
                direction *= shaped(mask, direction.ndim)
            # A step of 1e-6: the difference's own error is near 1e-9 for a value and curvature near 1.
            shifted = [
                term.answer(treedef.unflatten([*leaves[:i], shifted_leaf, *leaves[i + 1 :]]), batch).value
                for shifted_leaf in (leaves[i] + s * direction for s in (1e-6, -1e-6))
            ]
            numerical = (shifted[0] - shifted[1]) / 2e-6
            exact = float(np.sum(np.real(gradient[i] * direction)))
            if not np.isclose(exact, numerical, rtol=1e-5, atol=1e-6 * max(1.0, abs(shifted[0]))):
                yield (
                    f"gradient: along a random direction{of(path)} it is {exact}, by numerical differences "
                    f"{numerical}; a surrogate on purpose? then check_term(..., gradients=False)"
                )


def _same(got: PyTree, want: PyTree) -> bool:
    """Whether two trees have the same structure and numbers; a NaN is nothing's equal."""
    import chex  # here, as importing jaxreg need not wait for it

    try:
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    except AssertionError:
        return False
    return not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(got))


def _shown(reported: tuple[Array, dict[str, Array]]) -> str:
    value, metrics = jax.tree.map(float, reported)
    return f"{value} {metrics}" if metrics else f"{value}"
