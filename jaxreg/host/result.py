"""Read what a host function returned, and refuse garbage by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxreg.base.arrays import to_numpy
from jaxreg.core.spec import RESERVED_METRICS
from jaxreg.host.errors import HostTermError

CONTRACT = "value, (value, metrics) or (value, metrics, gradient)"
FLOAT32_MAX = float(np.finfo(np.float32).max)
OWN = "host_"  # begins the names of the metrics that jaxreg adds to a host term's own


@dataclasses.dataclass(frozen=True, slots=True)
class HostValue:
    """A host term's value, its metrics, and d(value)/d(logprobs) shaped like the logprobs, or None."""

    value: float
    metrics: dict[str, float]
    gradient: Any = None


def read(result: Any, like: Any, term: str, *, by_datum: bool) -> HostValue:
    """What a host function returned.

    Args:
      result: value, (value, metrics) or (value, metrics, gradient).
      like: arrays of the shapes that a gradient has: a list with one a datum, or any pytree.
      by_datum: which of the two.
      term: its name, for the errors.

    Raises:
      HostTermError: it is none of these, or a number in it is not finite.
    """
    if inspect.isawaitable(result):
        getattr(result, "close", lambda: None)()  # so that Python does not complain, too
        raise HostTermError(
            term, "fn returned something to await; declare it with `async def`, or return the value itself"
        )
    value, metrics, gradient = result, {}, None
    if isinstance(result, tuple):
        if len(result) not in (2, 3):
            raise HostTermError(term, f"fn returns {CONTRACT}; got a tuple of {len(result)}")
        value, metrics, gradient = (*result, None)[:3]
    return HostValue(
        _number(value, "its value", term, finite=True),
        _metrics(metrics, term),
        None if gradient is None else _gradient(gradient, like, term, by_datum),
    )


def _number(value: Any, what: str, term: str, *, finite: bool = False) -> float:
    if value is None:
        raise HostTermError(term, f"fn returns {CONTRACT}; {what} is None (is a return missing?)")
    array = _array(value, what, term)
    if isinstance(value, bool | str | bytes) or array.dtype.kind not in "fiu" or array.size != 1:
        shown = f"of shape {array.shape}" if array.ndim else repr(value)[:60]
        raise HostTermError(term, f"{what} is one real number, got {type(value).__name__} {shown}")
    number = float(array.reshape(()))
    if finite and not abs(number) <= FLOAT32_MAX:
        raise HostTermError(
            term, f"{what} is {number}, which would make the whole loss inf or nan in float32"
        )
    return number


def _metrics(metrics: Any, term: str) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise HostTermError(
            term,
            f"metrics are a mapping from name to number, got {type(metrics).__name__}; fn returns {CONTRACT}",
        )
    checked = {}
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name:
            raise HostTermError(term, f"a metric's name is a string that is not empty, got {name!r}")
        if name in RESERVED_METRICS or name.startswith(OWN):
            raise HostTermError(term, f"the metric {name!r} would collide with jaxreg's own; rename it")
        checked[name] = _number(metric, f"metric {name!r}", term)
    return checked


def _gradient(gradient: Any, like: Any, term: str, by_datum: bool) -> Any:
    if by_datum:
        try:
            given = list(gradient)
        except TypeError:
            raise HostTermError(
                term, f"its gradient is one array a datum, got {type(gradient).__name__}"
            ) from None
        if len(given) != len(like):
            raise HostTermError(term, f"its gradient has {len(given)} arrays for {len(like)} datums")
        return [
            _slope(slope, np.shape(one), f"its gradient of datum {i}", term)
            for i, (slope, one) in enumerate(zip(given, like, strict=True))
        ]
    wanted: Any = jax.tree.structure(like)
    got: Any = jax.tree.structure(gradient)
    if got != wanted:
        raise HostTermError(term, f"its gradient has the structure {got}, but what it is of has {wanted}")
    return jax.tree.map(lambda slope, one: _slope(slope, np.shape(one), "its gradient", term), gradient, like)


def _slope(slope: Any, shape: tuple[int, ...], what: str, term: str) -> np.ndarray:
    array = _array(slope, what, term)
    if array.dtype.kind not in "fiu":
        raise HostTermError(term, f"{what} is an array of real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise HostTermError(term, f"{what} has shape {array.shape}, but the logprobs there have {shape}")
    with np.errstate(over="ignore"):
        single = array.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        at = np.argwhere(~np.isfinite(single))[0].tolist()
        raise HostTermError(term, f"{what} is {array[tuple(at)]} at {at}, in float32 {single[tuple(at)]}")
    return single


def _array(value: Any, what: str, term: str) -> np.ndarray:
    try:
        return to_numpy(value)
    except Exception as error:
        raise HostTermError(term, f"{what} is no number or array: {type(value).__name__}") from error
