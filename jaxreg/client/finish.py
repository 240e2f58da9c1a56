"""The end of a step: its backward request is on its way, and the reply to it makes the result."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreg.base import html
from jaxreg.base.events import emit
from jaxreg.base.shown import never_fails
from jaxreg.batch.packing import pad
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.client.ask import Options
from jaxreg.client.errors import LogprobDrift, RequestFailed
from jaxreg.client.pack import Packed
from jaxreg.client.requests import arrival, wait
from jaxreg.client.types import CustomResult, Drift
from jaxreg.core.output import CustomLossOutput


class Sent(NamedTuple):
    """A step whose gradient, at ``logprobs``, was handed over; ``future`` is the client's, of the reply."""

    packed: Packed
    logprobs: list[np.ndarray]
    output: CustomLossOutput
    future: Any
    options: Options
    step: int | None


class CustomFuture:
    """The result of a step whose backward request is on its way."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self._lock = threading.Lock()
        self._outcome: CustomResult | Exception | None = None
        self._told = False

    def result(self, timeout: float | None = None) -> CustomResult:
        """The result; blocks until the server has answered.

        Raises:
          RequestTimedOut: not within ``timeout`` seconds; asking again waits on, and sends nothing.
          RemoteError: see `forward_backward_custom`.
        """
        with self._told_once():
            reply = None if self._outcome else wait(self._sent.future, timeout, "backward", "maybe")
        return self._finish(reply)

    async def result_async(self, timeout: float | None = None) -> CustomResult:
        """`result`, for event loops."""
        with self._told_once():
            reply = None if self._outcome else await arrival(self._sent.future, timeout, "backward", "maybe")
        return self._finish(reply)

    def __await__(self) -> Any:
        return self.result_async().__await__()

    def done(self) -> bool:
        """Whether `result` would return at once. False where the client's future cannot tell."""
        return self._outcome is not None or bool(getattr(self._sent.future, "done", lambda: False)())

    def __repr__(self) -> str:
        step = "a step" if self._sent.step is None else f"step {self._sent.step}"
        return f"<CustomFuture of {step}: {self._standing()}>"

    @never_fails
    def _repr_html_(self) -> str:
        return html.line(repr(self)) + self.output._repr_html_()

    def _standing(self) -> str:
        if isinstance(self._outcome, Exception):
            return f"failed, {type(self._outcome).__name__}"
        if self._outcome is not None:
            return "done"
        with contextlib.suppress(Exception):  # it is the client's, and not ours to trust
            if self.done():
                return "the server has answered; result() reads it"
        return "its loss is known (output), and the server's answer on its way"

    @property
    def output(self) -> CustomLossOutput:
        """What every term did: known before the server has answered."""
        return self._sent.output

    def _finish(self, reply: Any) -> CustomResult:
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = finish(self._sent, reply)
                except Exception as error:
                    self._outcome = error
                    emit("server.exception", step=self._sent.step, metadata={"error": error})
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """A request that failed is told to telemetry, the first time; one that is late is not."""
        try:
            yield
        except RequestFailed as error:
            with self._lock:
                first, self._told = not self._told, True
            if first:
                emit("server.exception", step=self._sent.step, metadata={"error": error})
            raise


def finish(sent: Sent, reply: Any) -> CustomResult:
    """Check the reply to the backward, and put the result together."""
    after = sent.packed.logprobs_of(reply, "backward", "yes")
    drift = _drift(sent.packed.batch, sent.logprobs, after)
    if drift.mean > sent.options.max_drift:
        _drifted(sent.options, drift)
    metrics = sent.output.to_flat_dict() | dict(getattr(reply, "metrics", None) or {})
    return CustomResult(sent.output, metrics, sent.logprobs, drift, reply)


def _drift(batch: TokenBatch, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Drift:
    """Mean and maximum of |after − before| over the tokens that count."""
    gap = np.abs(pad(after, *batch.shape).astype(np.float64) - pad(before, *batch.shape))
    weights = np.asarray(batch.weights)
    weights = weights.reshape(weights.shape + (1,) * (gap.ndim - weights.ndim))
    counted = gap[np.broadcast_to(weights != 0, gap.shape)]
    return Drift(float(counted.mean()), float(counted.max())) if counted.size else Drift(0.0, 0.0)


def _drifted(options: Options, drift: Drift) -> None:
    what = (
        f"the model's logprobs differ by {drift.mean:.3g} nats in the mean (at most {drift.max:.3g}) "
        f"from those that the gradient was computed at, and max_drift is {options.max_drift:g}. They came "
        f"from other weights (an optimizer step in between?), or from a sampler that computes otherwise"
    )
    if options.on_drift == "raise":
        raise LogprobDrift(what, step="backward", gradient_applied="yes")
    if options.on_drift == "warn":
        warnings.warn(what, stacklevel=5)  # _drifted, finish, _finish, result: then the caller's line
