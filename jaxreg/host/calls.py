"""The host terms of one step: started at once, waited for together, cancelled together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from jaxreg.base.events import emit, worth_telling
from jaxreg.host.errors import HostTermError, HostTermTimeout
from jaxreg.host.result import HostValue, read
from jaxreg.host.runners import Call
from jaxreg.host.runtime import Term

LOGGER = logging.getLogger("jaxreg.host")
LOOK = 0.25  # seconds between two looks at the clock: a process that has started moves its own deadline


@dataclasses.dataclass(frozen=True, slots=True)
class HostResult:
    """What a host term gave in a step.

    Attributes:
      value: its value; the last good one, or 0, where it failed.
      metrics: its own metrics, and ``host_seconds``, ``host_age``, ``host_trains``.
      gradient: shaped like the logprobs, or None.
    """

    value: float
    metrics: dict[str, float]
    gradient: Any


class HostCalls:
    """One step's calls. `start` them, then `collect`; or `cancel`, and `tell_the_rest`."""

    def __init__(
        self,
        terms: Sequence[Term],
        like: Any,
        step: int | None = None,
        *,
        by_datum: bool = True,
    ) -> None:
        self.terms = tuple(terms)
        self._like, self._by_datum = like, by_datum
        self._step = step
        self._calls: dict[str, tuple[Call, Term, int]] = {}
        self._failed: set[str] = set()
        self._cancelled: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start(self, data: Any, logprobs: Any = None) -> None:
        """Start every term that has not begun and whose arguments are there."""
        for term in self.terms:
            if term.name in self._calls or (term.takes_logprobs and logprobs is None):
                continue
            call = Call(term.timeout)
            self._calls[term.name] = call, term, term.runtime.asks()
            emit("regularizer.compute.start", step=self._step, metadata={"term": term.name})
            term.runtime.runner.start(call, (data, logprobs) if term.takes_logprobs else (data,))
        if self._cancelled.done():
            self._stop_all()

    def collect(self) -> dict[str, HostResult]:
        """Wait for all of them; results by name, in the order of the terms.

        Raises:
          HostTermError: one failed whose ``on_error`` is "raise"; the others are cancelled.
          concurrent.futures.CancelledError: `cancel` was called meanwhile.
        """
        results: dict[str, HostResult] = {}
        waiting = dict(self._calls)
        try:
            while waiting:
                self._wait(waiting)
                for name, (call, term, number) in tuple(waiting.items()):
                    if call.done() or call.deadline <= time.monotonic():
                        results[name] = self._result(call, term, number)
                        del waiting[name]
        except BaseException:
            self.cancel()
            raise
        return {term.name: results[term.name] for term in self.terms}

    def cancel(self) -> None:
        """Stop every call as far as it can be stopped, and let nobody wait for them."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled by two at once
            self._cancelled.set_result(None)
        self._stop_all()

    def tell_the_rest(self) -> None:
        """The step has failed: end, for who listens, what began and neither failed nor will count."""
        for name, (call, _, _) in tuple(self._calls.items()):
            if name not in self._failed:
                emit(
                    "regularizer.compute.stop",
                    step=self._step,
                    measurements={"duration": call.seconds},
                    metadata={"term": name, "counts": False},
                )

    def _stop_all(self) -> None:
        for call, term, _ in tuple(self._calls.values()):
            if not call.done():
                term.runtime.runner.cancel(call)

    def _wait(self, waiting: dict[str, tuple[Call, Term, int]]) -> None:
        calls = [call for call, _, _ in waiting.values()]
        soonest = min(call.deadline for call in calls) - time.monotonic()
        concurrent.futures.wait(
            [*calls, self._cancelled], max(0.0, min(soonest, LOOK)), concurrent.futures.FIRST_COMPLETED
        )
        if self._cancelled.done():
            raise concurrent.futures.CancelledError

    def _result(self, call: Call, term: Term, number: int) -> HostResult:
        try:
            value = self._value(call, term)
        except HostTermError as error:
            self._failed.add(term.name)
            emit(
                "regularizer.compute.exception",
                step=self._step,
                measurements={"duration": call.seconds},
                metadata={"term": term.name, "error": error, "on_error": term.on_error},
            )
            if term.on_error == "raise":
                raise
            return _stand_in(str(error), call, term, number)
        term.runtime.good(value, number)
        return _result_of(value, call, age=0)

    def _value(self, call: Call, term: Term) -> HostValue:
        if not call.done():
            seconds = call.seconds
            became = term.runtime.runner.stop(call)
            what = f"no value within its timeout of {term.timeout:g} s ({seconds:.3g} s by now): {became}"
            raise HostTermTimeout(term.name, what)
        # Not call.result(): it would raise here, and its traceback keep the call that keeps it.
        if (error := call.exception()) is not None:
            said = str(error) or "(no message)"
            raise HostTermError(term.name, f"{type(error).__name__}: {said}") from error
        return read(call.result(), self._like, term.name, by_datum=self._by_datum)


def _stand_in(said: str, call: Call, term: Term, number: int) -> HostResult:
    """What counts for a term that failed."""
    failures, last, age = term.runtime.failed(number)
    if term.on_error == "skip":
        last = None
    if worth_telling(failures):
        LOGGER.warning(
            "%s; it %s (failure %d of this term)",
            said,
            "is left out" if last is None else f"counts with its last value, of {age} steps ago",
            failures,
        )
    if last is None:
        return _result_of(HostValue(0.0, {}), call, age=-1)
    # It has no gradient: that was of other logprobs, and in this step it would be wrong.
    return _result_of(last, call, age=age)


def _result_of(value: HostValue, call: Call, age: int) -> HostResult:
    facts = {
        "host_seconds": call.seconds,
        "host_age": float(age),
        "host_trains": float(value.gradient is not None),
    }
    return HostResult(value.value, value.metrics | facts, value.gradient)
