"""That ordinary numbers far from 1 are no trouble: log-ratios of ±100, and scales from 1e-18 to 1e18."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.testing.subject import Answer, Subject, finite, float64, not_finite, of

_SCALES = (2.0**-60, 2.0**60)  # powers of two: they cost no digit, so that only the term's own numbers do
_LEAST, _MOST = 1e-36, 1e37  # what float32 holds with all digits, and room for a sum


def log_ratios(term: Subject) -> Iterator[str]:
    """One token of which x and an array of the batch think very differently."""
    x, batch = term.x, term.batch
    mask = np.asarray(batch.mask) & (np.asarray(batch.weights) != 0).reshape(*batch.shape, -1).any(-1)
    if not mask.any():
        return
    at = (*np.argwhere(mask)[0], *[0] * (x.ndim - 2))
    for name, array in batch.arrays.items():
        same = jnp.shape(array) == x.shape and jnp.issubdtype(jnp.result_type(array), jnp.floating)
        if not same:
            continue
        are_logprobs, its = (not (np.asarray(a)[mask] > 0).any() for a in (x, array))
        if are_logprobs != its:
            continue  # such as advantages: no log-ratio to x
        high, low = (-0.5, -100.5) if are_logprobs else (50.0, -50.0)
        for here, there in ((high, low), (low, high)):
            arrays = batch.arrays | {name: jnp.asarray(array).at[at].set(there)}
            answer = term.answer(jnp.asarray(x).at[at].set(here), batch.replace(arrays=arrays))
            if what := not_finite(answer, term.paths()):
                yield (
                    f"a log-ratio of ±100 stays finite: with x {here} and {name!r} {there} at "
                    f"{list(map(int, at))} {what}; bound the difference before exp, as in "
                    f"jnp.exp(jnp.clip(d, -30, 30)), and keep a branch that is not taken from "
                    f"overflowing, too (jnp.where before exp). A term that may overflow on purpose: "
                    f"check_term(..., log_ratios=False)"
                )
                return


def scales(term: Subject) -> Iterator[str]:
    """x times 1e-18 and 1e18: finite wherever float64's answer fits float32, and of the same degree."""
    with jax.enable_x64(True):
        wide, batch = float64(term.x), float64(term.batch)
        exact = {s: term.answer(_times(wide, s), batch) for s in (0.5, 1.0, 2.0, *_SCALES)}
    near = term.answer(term.x, term.batch)
    degree = _degree([exact[s].value for s in (0.5, 1.0, 2.0)])
    for s in _SCALES:
        got, want = term.answer(_times(term.x, s), term.batch), exact[s]
        if degree is not None and s < 1:
            want = Answer(
                exact[1.0].value * s**degree,
                want.metrics,
                [g * s ** (degree - 1) for g in exact[1.0].gradient],
            )
        if what := _wrong(got, want, near, exact[1.0], homogeneous=degree is not None, paths=term.paths()):
            yield (
                f"scales of 1e-18 and 1e18 are ordinary: at {s:.0e} times x {what}; let no constant (1e-8) "
                f"stand beside a norm, and take the scale out before squaring: m = max|x|, m·f(x / m). A "
                f"term with a scale of its own (a threshold, a clip) may say check_term(..., scales=False)"
            )
            return


def _wrong(
    got: Answer, want: Answer, near: Answer, exact: Answer, *, homogeneous: bool, paths: list[str]
) -> str | None:
    """What is wrong with an answer in float32, in words, where float32 can hold the right one."""
    if abs(want.value) < _MOST:
        if not np.isfinite(got.value):
            return f"the value is {got.value}, not {want.value:.4g}"
        # What rounding does at scale 1 it may do here, too.
        noise = 10 * abs(near.value - exact.value) / abs(exact.value) if exact.value else 0.0
        off = abs(got.value - want.value) > (0.01 + noise) * abs(want.value)
        if homogeneous and abs(want.value) > _LEAST and off:
            return f"the value is {got.value:.4g}, not {want.value:.4g}"
    for i, path in enumerate(paths):
        largest = np.max(np.abs(want.gradient[i]), initial=0.0)
        if not largest < _MOST:
            continue
        if not finite(got.gradient[i]).all():
            return f"the gradient{of(path)} is not finite, but its largest is {largest:.4g}"
        at_one = np.max(np.abs(exact.gradient[i]), initial=0.0)
        noise = 10 * np.max(np.abs(near.gradient[i] - exact.gradient[i]), initial=0.0) / (at_one or 1.0)
        off = np.max(np.abs(got.gradient[i] - want.gradient[i]), initial=0.0) > (0.01 + noise) * largest
        if homogeneous and largest > _LEAST and off:
            reached = np.max(np.abs(got.gradient[i]))
            return f"the gradient{of(path)} is off: up to {reached:.4g}, not {largest:.4g}"
    for name, metric in want.metrics.items():
        if abs(metric) < _MOST and not np.isfinite(got.metrics[name]):
            return f"the metric {name!r} is {got.metrics[name]}, not {metric:.4g}"
    return None


def _degree(values: list[float]) -> float | None:
    """d, if f(c·x) = cᵈ·f(x) for these values at ½x, x and 2x."""
    if not all(np.isfinite(values)) or not all(v * values[1] > 0 for v in values):
        return None
    below, above = np.log2(values[1] / values[0]), np.log2(values[2] / values[1])
    return round(float(above), 4) if abs(above - below) < 1e-6 else None


def _times(tree: object, scale: float) -> object:
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(scale, jnp.finfo(leaf.dtype).dtype), tree)
