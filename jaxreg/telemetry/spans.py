"""A step's events to OpenTelemetry spans, which are made when the step has ended.

A start is only noted, so no span stays open where no end comes: a step that was cancelled, a loop that was
left. What is noted is bounded, and `Spans.close` tells of it as unfinished.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from jaxreg.base.events import Event
from jaxreg.base.extras import need

MOST = 1000  # steps that have begun and not ended
TOLD = 1000  # steps whose span may still get a late failure of the server under it


@dataclasses.dataclass
class _Part:
    """A span to be: times are seconds since 1970."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, Any]
    error: BaseException | None = None


@dataclasses.dataclass
class _Step:
    """A step that has begun."""

    number: int | None
    began: float
    context: Any  # OpenTelemetry's, of the thread in which it began: the span that is around it
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    terms: dict[str, float] = dataclasses.field(default_factory=dict)  # host terms: when they began
    parts: list[_Part] = dataclasses.field(default_factory=list)


class Spans:
    """Keeps what has begun, and makes spans of what has ended."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._trace = need("opentelemetry.trace", "otel", "OpenTelemetry")
        self._current = need("opentelemetry.context", "otel", "OpenTelemetry").get_current
        self._open: list[_Step] = []
        self._told: collections.OrderedDict[int | None, Any] = collections.OrderedDict()
        self._on = {
            "custom_loss.start": self._begin,
            "custom_loss.stop": self._end,
            "custom_loss.exception": self._end,
            "regularizer.compute.start": self._term_begins,
            "regularizer.compute.stop": self._term_ends,
            "regularizer.compute.exception": self._term_ends,
            "server.exception": self._server_failed,
            "compile": self._compiled,
        }

    def hear(self, event: Event) -> None:
        """Note a beginning, or make the spans of what has ended."""
        if (method := self._on.get(event.name)) is not None:
            method(event)

    def close(self) -> None:
        """Make spans of what has not ended."""
        while self._open:
            self._tell(self._open.pop(0), time.time(), {"unfinished": True})

    def _begin(self, event: Event) -> _Step:
        step = _Step(event.step, event.time, self._current(), {"step": event.step})
        step.about |= {key: event.metadata.get(key) for key in ("terms", "datums", "tokens")}
        self._open.append(step)
        if len(self._open) > MOST:
            self._tell(self._open.pop(0), event.time, {"unfinished": True})
        return step

    def _find(self, number: int | None) -> _Step | None:
        """The oldest that has this number: two clients may both count from 0."""
        return next((step for step in self._open if step.number == number), None)

    def _end(self, event: Event) -> None:
        if (step := self._find(event.step)) is not None:
            self._open.remove(step)
        else:  # a loop of one's own tells no start
            began = event.time - event.measurements.get("duration", 0.0)
            step = _Step(event.step, began, self._current(), {"step": event.step})
        self._tell(step, event.time, _totals(event.metadata.get("report")), event.metadata.get("error"))

    def _term_begins(self, event: Event) -> None:
        # A new one where it comes without a step's start: what begins here ends with the step.
        step = self._find(event.step) or self._begin(event)
        step.terms[event.metadata["term"]] = event.time

    def _term_ends(self, event: Event) -> None:
        """Compiled terms have no start and no duration, and so no span."""
        step, term = self._find(event.step), event.metadata["term"]
        if step is None or "duration" not in event.measurements or term not in step.terms:
            return
        began, seconds = step.terms.pop(term), event.measurements["duration"]
        about = {"regularizer": term, **event.measurements}
        about |= {key: event.metadata.get(key) for key in ("on_error", "counts")}
        error = event.metadata.get("error")
        step.parts.append(_Part("regularizer.compute", began, began + seconds, about, error))

    def _server_failed(self, event: Event) -> None:
        part = _Part("server", event.time, event.time, {"step": event.step}, event.metadata.get("error"))
        self._make(part, self._told.get(event.step) or self._current())

    def _compiled(self, event: Event) -> None:
        about = {"program": event.metadata.get("program"), "changed": event.metadata.get("changed")}
        began = event.time - event.measurements.get("duration", 0.0)
        self._make(_Part("compile", began, event.time, about), self._current())

    def _tell(
        self, step: _Step, ended: float, more: Mapping[str, Any], error: BaseException | None = None
    ) -> None:
        whole = _Part("custom_loss", step.began, ended, {**step.about, **more}, error)
        inner = self._make(whole, step.context)
        for part in step.parts:
            self._make(part, inner)
        for term, began in step.terms.items():
            about = {"regularizer": term, "unfinished": True}
            self._make(_Part("regularizer.compute", began, ended, about), inner)
        self._told.pop(step.number, None)
        self._told[step.number] = inner
        if len(self._told) > TOLD:
            self._told.popitem(last=False)

    def _make(self, part: _Part, context: Any) -> Any:
        """The span, ended; gives the context for what is under it."""
        span = self._tracer.start_span(
            part.name,
            context=context,
            start_time=_nanoseconds(part.began),
            attributes={key: value for key, value in part.attributes.items() if value is not None},
        )
        ended = _nanoseconds(max(part.began, part.ended))
        if part.error is not None:
            span.record_exception(part.error, timestamp=ended)
            text = f"{type(part.error).__name__}: {part.error}"
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, text))
        span.end(ended)
        return self._trace.set_span_in_context(span, context)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _totals(report: Mapping[str, Any] | None) -> dict[str, Any]:
    if report is None:
        return {}
    return {
        "loss.total": report["loss_total"],
        "loss.base": report["base_loss"]["value"],
        "loss.regularizer_total": report["regularizer_total"],
        "grad_norm.total": report["total_grad_norm"],
        "nonfinite": report.get("nonfinite"),
    }
