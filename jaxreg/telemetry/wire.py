"""Metrics in the form of Tinker's wire: flat names that say how they are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxreg.base.events import Event
from jaxreg.core.output import CustomLossOutput, flat

PREFIX = "custom/"
REDUCTIONS = frozenset({"mean", "sum", "min", "max", "slack"})  # what SDKs old and new know


def tinker_metrics(output_or_report: CustomLossOutput | Mapping[str, Any]) -> dict[str, float]:
    """A step's numbers as ``custom/<flat name>:mean``, for every name of ``to_flat_dict()``.

    Tinker's SDK splits a batch into requests and combines their metrics by what stands behind the one colon
    of a name, "mean" weighted by the number of datums (``tinker/lib/chunked_fwdbwd_helpers.py``, SDK 0.38);
    a name without a colon, or with two, is an error there. Metrics of a custom loss begin with ``custom/``
    (``tinker/lib/public_interfaces/custom_loss.py``). So a further colon in a metric's name becomes ``_``,
    and a metric that a term has named ``…:sum``, ``…:max`` or the like keeps that reduction. The mean of
    norms over requests is no norm of the whole.

    Numbers that are not finite stay as they are; from a report, which has none, they are left out.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import tinker_metrics
      >>> _, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> tinker_metrics(out)
      {'custom/loss/total:mean': 3.0, 'custom/loss/base:mean': 3.0, 'custom/loss/regularizer_total:mean': 0.0}
    """
    if isinstance(output_or_report, CustomLossOutput):
        return _named(output_or_report.to_flat_dict())
    return _named({name: value for name, value in flat(output_or_report).items() if value is not None})


class TinkerMetrics:
    """A handler that gives every step's metrics, the loop's own included, to ``send(step, metrics)``.

    Args:
      send: called with the step, which may be None, and names as of `tinker_metrics` to floats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import TinkerMetrics
      >>> _, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> with jr.telemetry.attached(TinkerMetrics(lambda step, metrics: print(step, sorted(metrics)[0]))):
      ...     jr.telemetry.log(out, step=0)
      0 custom/loss/base:mean
    """

    _when_slow: ClassVar[str | None] = "let the function that it was given hand its work to a thread"

    def __init__(self, send: Callable[[int | None, dict[str, float]], object]) -> None:
        self._send = send

    def __call__(self, event: Event) -> None:
        """Send a step's metrics."""
        if event.name == "custom_loss.stop":
            self._send(event.step, _named(event.metadata["metrics"]))


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {_wire_name(name): float(value) for name, value in metrics.items()}


def _wire_name(name: str) -> str:
    stem, _, reduction = name.rpartition(":")
    if not stem or reduction not in REDUCTIONS:
        stem, reduction = name, "mean"
    return f"{PREFIX}{stem.replace(':', '_')}:{reduction}"
