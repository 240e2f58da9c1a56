"""Numbers of parts that become the whole's, each by its kind: metrics, and norms, whose squares add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxreg.base.kinds import MetricKind
from jaxreg.base.numbers import log_limit
from jaxreg.base.types import Array

ADDED = ("sum", "max", "min", "root", "same")


def whole_metrics(own: Mapping[str, Array], kinds: Mapping[str, MetricKind]) -> dict[str, Array]:
    """The whole's metrics: those that were added up, and those that are functions of one of them."""
    found = {name: _unsigned(metric, kinds.get(name)) for name, metric in own.items()}
    for name, kind in kinds.items():
        if isinstance(kind, tuple) and kind[0] == "exp" and kind[1] in found:
            nats = found[kind[1]]
            held = jnp.exp(jnp.minimum(nats, log_limit(nats.dtype)))
            found[name] = jnp.where(jnp.isposinf(nats), jnp.inf, held)
    return found


def merged(a: Array, b: Array, kind: MetricKind) -> Array:
    """A metric of two parts, by its kind."""
    if kind == "max":
        return jnp.maximum(a, b)
    if kind == "min":
        return jnp.minimum(a, b)
    if kind == "root":
        return root_of_squares(a, b)
    return b if kind == "same" else saturated_sum(a, b)


def saturated_sum(a: Array, b: Array) -> Array:
    """a + b, and the largest number where that would be infinite though both are finite, as of one batch."""
    return _saturated(a + b, jnp.isfinite(a) & jnp.isfinite(b))


def saturated_psum(value: Array, axis_name: Any) -> Array:
    """`saturated_sum` over the devices of a mesh axis."""
    odd = lax.psum(jnp.logical_not(jnp.isfinite(value)).astype(jnp.int32), axis_name)
    return _saturated(lax.psum(value, axis_name), odd == 0)


def _saturated(total: Array, finite: Array) -> Array:
    if not jnp.issubdtype(total.dtype, jnp.floating):
        return total
    most = jnp.asarray(jnp.finfo(total.dtype).max, total.dtype)
    return jnp.where(finite & jnp.isinf(total), jnp.sign(total) * most, total)


def over_axis(metric: Array, kind: MetricKind, axis_name: Any) -> Array:
    """A metric of the parts that the devices of a mesh axis have, by its kind."""
    if kind == "min":
        return lax.pmin(metric, axis_name)
    if kind in ("max", "same"):
        return lax.pmax(metric, axis_name)
    if kind != "root":
        return saturated_psum(metric, axis_name)
    size = divisor(lax.pmax(jnp.abs(metric), axis_name))
    return size * _signed_root(lax.psum(_signed_square(metric / size), axis_name))


def _unsigned(metric: Array, kind: MetricKind) -> Array:
    """As of a whole batch: the largest of nothing is 0, and the root of a negative number NaN."""
    if kind == "root":
        return jnp.where(metric < 0, jnp.nan, metric)
    nothing = jnp.isneginf(metric) if kind == "max" else jnp.isposinf(metric)
    return jnp.where(nothing, 0, metric) if kind in ("max", "min") else metric


def root_of_squares(a: Array, b: Array) -> Array:
    """√(a² + b²) at any scale; below 0, where a mean under negative weights is, the root keeps the sign."""
    size = divisor(jnp.maximum(jnp.abs(a), jnp.abs(b)))
    return size * _signed_root(_signed_square(a / size) + _signed_square(b / size))


def divisor(size: Array) -> Array:
    """A size to divide by: 1 where it is 0, infinite or NaN."""
    return jnp.where((size > 0) & (size < jnp.inf), size, jnp.ones_like(size))


def _signed_square(x: Array) -> Array:
    return x * jnp.abs(x)


def _signed_root(x: Array) -> Array:
    return jnp.sign(x) * jnp.sqrt(jnp.abs(x))
