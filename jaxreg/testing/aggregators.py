"""Does an aggregator keep the contract that the built-in ones keep?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.shown import called
from jaxreg.base.types import Array

SCALES = (1e-15, 1e15)


class AggregatorCheckError(AssertionError):
    """An aggregator breaks the contract; the message names every property that failed, and where."""


def check_aggregator(
    aggregator: Callable[..., Any], *, size: int = 4, cases: int = 20, seed: int = 0
) -> None:
    """Check an aggregator of your own as the built-in ones are checked.

    Over random, conflicting and parallel gradients, and some that are 0: coefficients [K] that are finite;
    the same under ``jit`` and ``vmap``; that go with the terms when these change places; a direction that
    scales with the gradients, from 1e-15 to 1e15, if it says nothing else (``linear = False``); no inner
    product below 0 with any gradient, if it says so (``non_conflicting = True``); one gradient alone; and all
    of them 0. Of one that draws at random the order of terms is left out.

    Args:
      aggregator: a function from a Gramian [K, K] to coefficients [K], or one of `jaxreg.aggregation`.
      size: K.
      cases: how many Gramians of a kind.
      seed: of the gradients.

    Raises:
      AggregatorCheckError: naming every property that does not hold.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.testing.check_aggregator(jr.aggregation.UPGrad())
      >>> jr.testing.check_aggregator(lambda gramian: gramian[0])
      Traceback (most recent call last):
      jaxreg.testing.aggregators.AggregatorCheckError: <lambda>...
    """
    subject = _Subject(aggregator, size, cases, seed)
    failures = [f"- {name}: {what}" for name, check in _CHECKS.items() if (what := _tried(check, subject))]
    if failures:
        raise AggregatorCheckError("\n".join([f"{called(aggregator)} as an aggregator:", *failures]))


class _Subject:
    """The aggregator, and gradients to try it on."""

    def __init__(self, aggregator: Any, size: int, cases: int, seed: int) -> None:
        self.aggregator, self.size = aggregator, size
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(3, cases, size, size + 3))
        rows[1] -= 1.5 * rows[1].mean(axis=1, keepdims=True)
        rows[2, :, -1] = 0
        self.rows = rows.reshape(-1, size, size + 3)
        self.key = jax.random.key(seed)
        self.alone, self.batched = jax.jit(self.of), jax.jit(jax.vmap(self.of))

    def of(self, gramian: Array) -> Array:
        """The coefficients."""
        if getattr(self.aggregator, "needs_key", False):
            return jnp.asarray(self.aggregator(gramian, key=self.key))
        return jnp.asarray(self.aggregator(gramian))

    def direction(self, rows: np.ndarray) -> np.ndarray:
        """Of gradients [N, K, D]."""
        coefficients = np.asarray(self.batched(gramians(rows)), np.float64)
        return np.asarray(np.einsum("nk,nkd->nd", coefficients, rows))


def gramians(rows: np.ndarray) -> Array:
    """[N, K, K] float32."""
    return jnp.asarray(np.einsum("nkd,nld->nkl", rows, rows), jnp.float32)


def _tried(check: Callable[[_Subject], str | None], subject: _Subject) -> str | None:
    try:
        return check(subject)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def _shape(subject: _Subject) -> str | None:
    found = subject.alone(gramians(subject.rows)[0])
    if found.shape != (subject.size,):
        return f"of a Gramian {[subject.size] * 2} it makes shape {list(found.shape)}, not [{subject.size}]"
    return None


def _finite(subject: _Subject) -> str | None:
    found = np.asarray(subject.batched(gramians(subject.rows)))
    bad = int(np.sum(~np.isfinite(found).all(axis=1)))
    return f"in {bad} of {len(found)} cases they are not" if bad else None


def _transformed(subject: _Subject) -> str | None:
    every, some = gramians(subject.rows), slice(None, None, len(subject.rows) // 2)
    eager, jitted = subject.of(every[0]), np.stack([subject.alone(gram) for gram in every[some]])
    size = np.abs(jitted).max() + 1e-30
    for name, found, want in (("jit", jitted[0], eager), ("vmap", subject.batched(every)[some], jitted)):
        if not np.allclose(found, want, rtol=1e-3, atol=1e-4 * size):
            return f"under {name} they are others"
    return None


def _order(subject: _Subject) -> str | None:
    if getattr(subject.aggregator, "needs_key", False) or getattr(subject.aggregator, "asymmetric", False):
        return None
    order = np.roll(np.arange(subject.size), 1)
    return _differs(
        subject.direction(subject.rows[:, order]), subject.direction(subject.rows), subject.rows, 1e-3
    )


def _scaled(subject: _Subject) -> str | None:
    if not getattr(subject.aggregator, "linear", True):
        return None
    want = subject.direction(subject.rows)
    for scale in SCALES:
        got = subject.direction(subject.rows * scale) / scale
        if what := _differs(got, want, subject.rows, 1e-3):
            return f"at {scale:g} times the gradients {what}"
    return None


def _non_conflicting(subject: _Subject) -> str | None:
    if not getattr(subject.aggregator, "non_conflicting", False):
        return None
    direction = subject.direction(subject.rows)
    along = np.einsum("nkd,nd->nk", subject.rows, direction)
    lengths = np.linalg.norm(subject.rows, axis=2) * np.linalg.norm(direction, axis=1, keepdims=True)
    worst = float(np.min(along / np.where(lengths > 0, lengths, 1)))
    return f"it conflicts with a gradient, cosine {worst:.2g}" if worst < -1e-2 else None


def _alone(subject: _Subject) -> str | None:
    found = np.asarray(subject.alone(jnp.full((1, 1), 4.0)))
    return None if found.shape == (1,) and np.isfinite(found).all() and found[0] > 0 else f"it makes {found}"


def _nothing(subject: _Subject) -> str | None:
    found = np.asarray(subject.alone(jnp.zeros((subject.size, subject.size))))
    return None if np.isfinite(found).all() else f"it makes {found}"


def _differs(got: np.ndarray, want: np.ndarray, rows: np.ndarray, tolerance: float) -> str | None:
    size = np.linalg.norm(rows, axis=(1, 2)) + np.linalg.norm(want, axis=1)
    off = np.linalg.norm(got - want, axis=1) / size
    off = np.where(np.isfinite(off), off, np.inf)
    bad = int(np.sum(off > tolerance))
    return (
        f"the direction is another in {bad} of {len(off)} cases, by {np.max(off):.2g}"
        if bad > 0.05 * len(off)
        else None
    )


_CHECKS: dict[str, Callable[[_Subject], str | None]] = {
    "coefficients [K]": _shape,
    "finite coefficients": _finite,
    "the same under jit and vmap": _transformed,
    "whatever the order of the terms": _order,
    "linear in the gradients' scale": _scaled,
    "conflicts with no gradient": _non_conflicting,
    "one gradient alone": _alone,
    "all gradients 0": _nothing,
}
