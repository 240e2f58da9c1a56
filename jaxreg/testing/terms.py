"""Does a term keep the contract that the built-in ones keep?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.paths import leaf_paths
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.core.spec import call_term, requested_arguments
from jaxreg.core.spec import check_term as check_signature

_GARBAGE = (7.5, -np.inf, np.nan)


class TermCheckError(AssertionError):
    """A term breaks the contract; the message names every property that failed, and where."""


def check_term(
    fn: TermFn,
    x: PyTree,
    batch: PyTree = None,
    *,
    rows_together: int = 1,
    gradients: bool = True,
    seed: int = 0,
) -> None:
    """Check a term of your own as the built-in ones are checked.

    On the example given: the value is a finite scalar, and so are the metrics; they are the same under
    ``jit`` and ``vmap``; the gradient agrees with numerical differences in float64. Where the batch is a
    `TokenBatch` and x has its shape: padding gets exactly no gradient, and whatever stands there, and
    however much of it there is, changes nothing; nor does the order of the datums.

    Args:
      fn: the term, ``fn(x, batch)``, as for `RegularizerSpec`.
      x: an example of what it is a function of, where it is differentiable. For token data let
        the mask have some False, or the padding is not tested.
      batch: what it reads besides.
      rows_together: how many rows in a row belong together: 2 for a term on pairs.
      gradients: False leaves out the comparison with numerical differences, for a surrogate whose
        gradient is not that of its value (stop_gradient inside).
      seed: of the random directions and permutations.

    Raises:
      TermCheckError: naming all properties that failed, and where.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.from_arrays(mask=jnp.array([[True, True], [True, False]]))
      >>> x = jnp.array([[-1.0, -2.0], [-0.5, -0.3]])
      >>> jr.testing.check_term(jr.regularizers.L2(), x, batch)
      >>> jr.testing.check_term(lambda x, batch: jnp.mean(x**2), x, batch)
      Traceback (most recent call last):
      ...
      jaxreg.testing.terms.TermCheckError: the term does not keep the contract:
      - no gradient into padding: it is not 0 at [1, 1]...
      ...
    """
    check_signature(fn, "the term")
    rng = np.random.default_rng(seed)
    x = jax.tree.map(jnp.asarray, x)
    extra: dict[str, Any] = {}
    if "key" in requested_arguments(fn):
        extra["key"] = jax.random.key(seed)
    if "state" in requested_arguments(fn):
        extra["state"] = fn.init()  # type: ignore[attr-defined]

    def reported(x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        return call_term(fn, x, batch, extra, "the term")[:2]

    def value(x: PyTree, batch: PyTree) -> Array:
        return reported(x, batch)[0]

    problems = list(_values(fn, x, batch, extra, value))
    if not problems:  # without a finite value the rest says nothing
        problems += _transformations(x, batch, reported, rng)
        if gradients:
            problems += _numerical(x, batch, value, rng)
        if isinstance(batch, TokenBatch) and jnp.shape(x)[:2] == batch.shape:
            problems += _padding(x, batch, value)
            problems += _order(x, batch, value, rng, rows_together)
    if problems:
        raise TermCheckError("the term does not keep the contract:\n" + "\n".join(f"- {p}" for p in problems))


def _values(
    fn: TermFn, x: PyTree, batch: PyTree, extra: dict[str, Any], value: Callable[..., Array]
) -> Iterator[str]:
    got, metrics, _ = call_term(fn, x, batch, extra, "the term")
    if not np.isfinite(got):
        yield f"finite value: it is {float(got)}"
    for name, metric in metrics.items():
        if not np.isfinite(metric):
            yield f"finite metrics: {name!r} is {float(metric)}"
    gradient = jax.grad(value)(x, batch)
    for path, leaf in zip(leaf_paths(x), jax.tree.leaves(gradient), strict=True):
        if not np.isfinite(np.asarray(leaf, np.float64)).all():
            yield f"finite gradient: {_where(~np.isfinite(np.asarray(leaf, np.float64)))}{_of(path)}"


def _transformations(
    x: PyTree, batch: PyTree, reported: Callable[..., PyTree], rng: np.random.Generator
) -> Iterator[str]:
    """The value and the metrics."""
    plain = reported(x, batch)
    jitted = jax.jit(reported)(x, batch)
    if not _same(jitted, plain):
        yield (
            f"same under jit: {_shown(jitted)} with, {_shown(plain)} without; a term is a pure function of "
            f"its arguments"
        )
    nudges = [
        jax.tree.map(lambda a: a + 0.01 * rng.normal(size=a.shape).astype(a.dtype), x) for _ in range(3)
    ]
    mapped = jax.vmap(reported, in_axes=(0, None))(jax.tree.map(lambda *a: jnp.stack(a), *nudges), batch)
    for i, nudge in enumerate(nudges):
        one, alone = jax.tree.map(lambda a, i=i: a[i], mapped), reported(nudge, batch)
        if not _same(one, alone):
            yield f"same under vmap: {_shown(one)} with, {_shown(alone)} without"
            break


def _numerical(
    x: PyTree, batch: PyTree, value: Callable[..., Array], rng: np.random.Generator
) -> Iterator[str]:
    """Along random directions, one leaf at a time, in float64 for this block alone."""
    with jax.enable_x64(True):
        wide, wide_batch = (_float64(tree) for tree in (x, batch))
        gradient = jax.grad(value)(wide, wide_batch)
        leaves, treedef = jax.tree.flatten(wide)
        mask = batch.mask if isinstance(batch, TokenBatch) else None
        for i, path in enumerate(leaf_paths(x)):
            direction = rng.normal(size=leaves[i].shape)
            if mask is not None and direction.shape[:2] == mask.shape:
                direction *= np.asarray(mask).reshape(mask.shape + (1,) * (direction.ndim - 2))
            # A step of 1e-6: the difference's own error is near 1e-9 for a value and curvature near 1.
            shifted = [
                value(
                    jax.tree.unflatten(treedef, [*leaves[:i], leaves[i] + s * direction, *leaves[i + 1 :]]),
                    wide_batch,
                )
                for s in (1e-6, -1e-6)
            ]
            numerical = float(shifted[0] - shifted[1]) / 2e-6
            exact = float(jnp.sum(jax.tree.leaves(gradient)[i] * direction))
            if not np.isclose(exact, numerical, rtol=1e-5, atol=1e-6 * max(1.0, abs(float(shifted[0])))):
                yield (
                    f"gradient: along a random direction{_of(path)} it is {exact}, by numerical differences "
                    f"{numerical}; a surrogate on purpose? then check_term(..., gradients=False)"
                )


def _padding(x: Array, batch: TokenBatch, value: Callable[..., Array]) -> Iterator[str]:
    mask = np.asarray(batch.mask)
    if mask.all():
        return
    plain = float(value(x, batch))
    gradient = np.asarray(jax.grad(value)(x, batch), np.float64)
    leaked = (gradient != 0).reshape(*mask.shape, -1).any(-1) & ~mask
    if leaked.any():
        yield (
            f"no gradient into padding: it is not 0 {_where(leaked)}, where the mask is False; mask it, with "
            f"batch.where(x) or batch.mean(...)"
        )
    for garbage in _GARBAGE:
        dirty_x = _fill(x, mask, garbage)
        got = float(value(dirty_x, batch))
        if not _close(got, plain):
            yield f"padding of x changes nothing: with {garbage} in it the value is {got}, not {plain}"
            break
        slope = np.asarray(jax.grad(value)(dirty_x, batch), np.float64)
        if not np.isfinite(slope).all():
            yield (
                f"padding of x changes nothing: with {garbage} in it the gradient is not finite "
                f"{_where(~np.isfinite(slope))}; mask x before, not only after: batch.where(x)"
            )
            break
    for garbage in _GARBAGE:
        arrays = {name: _fill(array, mask, garbage) for name, array in batch.arrays.items()}
        got = float(value(x, batch.replace(arrays=arrays)))  # type: ignore[attr-defined]
        if not _close(got, plain):
            yield f"padding of the batch changes nothing: {garbage} there makes the value {got}, not {plain}"
            break
    longer, longer_x = _extended(batch), _extend(x, mask.shape)
    got = float(value(longer_x, longer))
    if not _close(got, plain):
        yield f"more padding changes nothing: with twice as much the value is {got}, not {plain}"


def _order(
    x: Array, batch: TokenBatch, value: Callable[..., Array], rng: np.random.Generator, together: int
) -> Iterator[str]:
    groups = np.arange(len(batch.mask)).reshape(-1, together)
    order = rng.permutation(len(groups))
    rows = groups[np.roll(order, 1) if (order == np.arange(len(order))).all() else order].reshape(-1)
    got = float(value(x[rows], jax.tree.map(lambda a: a[rows], batch)))
    plain = float(value(x, batch))
    if not _close(got, plain):
        yield f"the order of datums changes nothing: as {rows.tolist()} the value is {got}, not {plain}"


def _fill(array: Any, mask: np.ndarray, garbage: float) -> Any:
    """The array with garbage where the mask is False; integers get an unlikely number instead."""
    if jnp.shape(array)[:2] != mask.shape:
        return array
    real = mask.reshape(mask.shape + (1,) * (jnp.ndim(array) - 2))
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        garbage = 3
    return jnp.where(real, array, jnp.asarray(garbage, jnp.result_type(array)))


def _extend(array: Any, shape: tuple[int, ...]) -> Any:
    """Twice the rows and twice the tokens, by zeros."""
    pads = [(0, n) for n in shape[: jnp.ndim(array)]] + [(0, 0)] * (jnp.ndim(array) - 2)
    return jnp.pad(jnp.asarray(array), pads) if jnp.shape(array)[:2] == shape[: jnp.ndim(array)] else array


def _extended(batch: TokenBatch) -> TokenBatch:
    return jax.tree.map(lambda array: _extend(array, batch.shape), batch)


def _float64(tree: PyTree) -> PyTree:
    def widen(leaf: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return jnp.asarray(np.asarray(leaf, np.float64))
        return leaf

    return jax.tree.map(widen, tree)


def _close(a: float, b: float) -> bool:
    return bool(np.isclose(a, b, rtol=1e-5, atol=1e-6))


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


def _where(bad: np.ndarray) -> str:
    places = np.argwhere(bad)
    return f"at {places[0].tolist()}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")


def _of(path: str) -> str:
    return f" of x at {path!r}" if path else ""
