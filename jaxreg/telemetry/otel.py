"""Spans and metrics for OpenTelemetry."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxreg.base.events import Event
from jaxreg.base.extras import need
from jaxreg.base.version import __version__
from jaxreg.telemetry.spans import Spans

OF_A_TERM = ("value", "weight", "contribution", "grad_norm")
# Seconds. The SDK's own boundaries are for milliseconds: all of these would fall into the first two.
BOUNDARIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class OpenTelemetry:
    """A handler that makes spans and metrics. It needs the API only; setting up the SDK is the user's.

    Spans: ``custom_loss`` a step (attributes ``step``, ``loss.total``, ``loss.base``,
    ``loss.regularizer_total``, ``grad_norm.total``, ``nonfinite``, ``terms``, ``datums``, ``tokens``; those
    that are known), under the span that was current when the step began; under it ``regularizer.compute`` for
    each host term, which alone have a time of their own, and ``server`` for a backward request that failed;
    ``compile``. Failures are recorded on their span, with the status ERROR. A step or a host term whose end
    never came is told with the attribute ``unfinished`` when the handler is detached.

    Metrics: the gauges ``jaxreg.loss.total`` and ``jaxreg.regularizer.value``, ``….weight``,
    ``….contribution`` and ``….grad_norm``, with the attribute ``regularizer``; the histograms of seconds
    ``jaxreg.custom_loss.duration``, ``jaxreg.custom_loss.part.duration`` (attribute ``part``),
    ``jaxreg.regularizer.duration`` and ``jaxreg.compile.duration``; the counter ``jaxreg.warnings``
    (attribute ``kind``). Numbers that are not finite are left out.

    Args:
      tracer_provider: by default, the global one.
      meter_provider: by default, the global one.

    Raises:
      ImportError: the API is not installed: ``pip install "jaxreg[otel]"``.

    Example:
      >>> import jaxreg as jr
      >>> from jaxreg.telemetry import OpenTelemetry
      >>> def train():
      ...     with jr.telemetry.attached(OpenTelemetry()):
      ...         ...  # the loop, which calls jr.telemetry.log(out, step=step)
    """

    _when_slow: ClassVar[str | None] = "give the SDK a BatchSpanProcessor, which exports in a thread"

    def __init__(self, tracer_provider: Any = None, meter_provider: Any = None) -> None:
        trace = need("opentelemetry.trace", "otel", "OpenTelemetry")
        metrics = need("opentelemetry.metrics", "otel", "OpenTelemetry")
        meter = metrics.get_meter("jaxreg", __version__, meter_provider)
        self._spans = Spans(trace.get_tracer("jaxreg", __version__, tracer_provider))
        self._total = meter.create_gauge("jaxreg.loss.total")
        self._of_a_term = {key: meter.create_gauge(f"jaxreg.regularizer.{key}") for key in OF_A_TERM}
        self._warnings = meter.create_counter("jaxreg.warnings")
        self._seconds = {
            what: meter.create_histogram(
                f"jaxreg.{what}.duration", unit="s", explicit_bucket_boundaries_advisory=BOUNDARIES
            )
            for what in ("custom_loss", "custom_loss.part", "regularizer", "compile")
        }

    def __call__(self, event: Event) -> None:
        """Record the event's numbers, and make its spans."""
        numbers, about = event.measurements, event.metadata
        if event.name == "custom_loss.stop":
            if (total := about["report"]["loss_total"]) is not None:
                self._total.set(total)
            for part, seconds in numbers.items():
                if part == "duration":
                    self._seconds["custom_loss"].record(seconds)
                else:
                    self._seconds["custom_loss.part"].record(seconds, {"part": part})
        elif event.name == "regularizer.compute.stop":
            of = {"regularizer": about["term"]}
            for key in numbers.keys() & self._of_a_term.keys():
                self._of_a_term[key].set(numbers[key], of)
            if "duration" in numbers:
                self._seconds["regularizer"].record(numbers["duration"], of)
        elif event.name == "compile":
            self._seconds["compile"].record(numbers.get("duration", 0.0))
        elif event.name == "warning":
            self._warnings.add(1, {"kind": str(about.get("kind"))})
        self._spans.hear(event)

    def close(self) -> None:
        """Tell of the steps that have not ended. The providers are their owner's, and stay open."""
        self._spans.close()
