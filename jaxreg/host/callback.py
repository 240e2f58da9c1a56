"""A host term inside a compiled program: a callback that XLA schedules, with the gradient it gives."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.shown import called
from jaxreg.base.types import Array, PyTree
from jaxreg.host.calls import HostCalls
from jaxreg.host.errors import HostTermError
from jaxreg.host.rows import as_data, as_gradient, as_values, is_by_datum
from jaxreg.host.runtime import Term

FACTS = ("host_seconds", "host_age", "host_trains")


@dataclasses.dataclass(frozen=True)
class HostTerm:
    """``fn(x, batch)`` of a `HostRegularizer`."""

    regularizer: Term
    metric_kinds: ClassVar = {"host_seconds": "sum", "host_age": "max", "host_trains": "max"}

    def _shown(self) -> str:
        return f"on the host: {called(self.regularizer.fn)}"

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """Its value, with the host function's gradient, and its metrics."""
        names = (*FACTS, *self.regularizer.metrics)
        scalar = jax.ShapeDtypeStruct((), np.float32)
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), x)
        value, gradient, *metrics = jax.pure_callback(
            self._on_host,
            (scalar, like, *[scalar] * len(names)),
            jax.lax.stop_gradient(x),
            jax.lax.stop_gradient(batch),
            vmap_method="sequential",
        )
        return _with_gradient(x, value, gradient), dict(zip(names, metrics, strict=True))

    def _on_host(self, x: PyTree, batch: PyTree) -> tuple[Any, ...]:
        term = self.regularizer
        by_datum = not isinstance(x, list | tuple | dict) and is_by_datum(x, batch)
        values = as_values(x, batch, by_datum)
        calls = HostCalls([term], values, by_datum=by_datum)
        calls.start(as_data(batch), values)
        done = calls.collect()[term.name]
        x = jax.tree.map(np.asarray, x)
        gradient = (
            jax.tree.map(np.zeros_like, x)
            if done.gradient is None
            else as_gradient(done.gradient, x, batch, by_datum)
        )
        skipped = done.metrics["host_age"] < 0  # It has no metrics of its own then; they are 0.
        missing = [name for name in term.metrics if name not in done.metrics and not skipped]
        if missing:
            raise HostTermError(term.name, f"metrics= names {missing}, which fn did not return")
        metrics = [np.float32(done.metrics.get(name, 0.0)) for name in (*FACTS, *term.metrics)]
        return np.float32(done.value), gradient, *metrics


@jax.custom_jvp
def _with_gradient(x: PyTree, value: Array, gradient: PyTree) -> Array:
    """``value``, whose derivative in x is ``gradient``."""
    del x, gradient
    return value


@_with_gradient.defjvp
def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    _, value, gradient = primals
    along, _, _ = tangents
    slopes = zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True)
    return value, sum(
        (jnp.sum(slope * step, dtype=value.dtype) for slope, step in slopes), jnp.zeros_like(value)
    )
