"""One training step on a model that somebody else runs: the loss here, forward and backward there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxreg._arrays import to_numpy
from jaxreg._types import Array, PyTree, TermFn
from jaxreg.batch import TokenBatch
from jaxreg.client import wire
from jaxreg.client.errors import Applied, LogprobDrift, RequestFailed, RequestTimedOut, Step
from jaxreg.client.local import Regularizers, as_objective, drift_between, dry_run, linearize
from jaxreg.client.types import CustomResult, Drift
from jaxreg.norms import GradNorms
from jaxreg.objective import CompositeLoss
from jaxreg.output import CustomLossOutput

LOSS = "cross_entropy"
_TIMEOUTS = (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError)


def forward_backward_custom(
    client: Any,
    data: Sequence[Any],
    objective: CompositeLoss | TermFn,
    *,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
    logprobs: Sequence[Any] | None = None,
    max_drift: float = 0.05,
    on_drift: Literal["warn", "raise", "ignore"] = "warn",
    state: PyTree = None,
    key: Array | None = None,
    timeout: float | None = None,
) -> CustomFuture:
    """Forward there, loss and gradient here, backward there.

    The server computes the logprobs of ``target_tokens``; the objective is evaluated and differentiated
    at them by one compiled program; and −d(loss)/d(logprobs) goes back as the weights of the server's
    linear cross-entropy, ``Σ −weight·logprob``, whose gradient in the model's parameters is then that of
    the objective. Two requests; with ``logprobs=``, one.

    **Order.** The call returns when the backward request has been handed to the client (the SDK numbers
    its requests then), so an ``optim_step`` that is issued after it comes after it, whatever the order in
    which replies arrive. It therefore waits for the forward's reply. Inside an event loop use
    `forward_backward_custom_async`, which waits without blocking the loop.

    Nothing is sent twice: retries are the SDK's business.

    Args:
      client: anything with ``forward(data, loss_fn)`` and ``forward_backward(data, loss_fn)`` that return
        futures, such as the Tinker SDK's ``TrainingClient`` or `EmbeddedTrainingClient`.
      data: the API's datums. Every array in ``loss_fn_inputs`` reaches the terms by its name, as
        ``batch[name]``; the server gets ``target_tokens`` ([T], or [T, K] for the top K), weights, and
        what else the datum has beside ``loss_fn_inputs``.
      objective: made by `compose`, or a base loss, to go with ``regularizers=`` and ``track_grad_norms=``;
        it is then composed once and remembered.
      logprobs: one array a datum, of ``target_tokens``' shape: logprobs that the current weights gave when
        the data was sampled. The forward request is then left out. What comes back with the gradient is
        compared with them.
      max_drift: by how many nats the logprobs may differ, in the mean over the tokens that count.
      on_drift: past it, ``"warn"``, ``"raise"`` `LogprobDrift` (the gradient is applied by then: load a
        saved state), or ``"ignore"``. The difference stands in the result as ``drift`` in any case.
      state: for schedules and stateful terms: ``objective.init()``, then ``result.output.state``.
      key: a random key, for terms that ask for one.
      timeout: seconds to wait for the reply to the forward request.

    Returns:
      A `CustomFuture` of a `CustomResult`: ``.result()``, or ``await`` it.

    Raises:
      TypeError, ValueError: something is wrong with the data, before anything is sent.
      RemoteError: with the step that failed and whether a gradient may have been applied.

    Example:
      >>> import jaxreg as jr
      >>> client = jr.client.EmbeddedTrainingClient(vocabulary=16)
      >>> data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})]
      >>> entropy = dict(name="entropy", fn=jr.regularizers.Entropy(), weight=0.1)
      >>> step = jr.client.forward_backward_custom(
      ...     client, data, jr.losses.CrossEntropy(), regularizers=[entropy])
      >>> _ = client.optim_step(jr.client.AdamParams(learning_rate=1e-2))
      >>> sorted(step.result().output.regularizers)
      ['entropy']
    """
    if _inside_event_loop():
        raise RuntimeError(
            "forward_backward_custom waits for the server, which would block the running event loop; say "
            "`future = await jaxreg.client.forward_backward_custom_async(...)`"
        )
    composed = as_objective(objective, regularizers, track_grad_norms)
    task = _Task(client, data, composed, logprobs, max_drift, on_drift, state, key)
    if task.logprobs is None:
        future = task.submit_forward()
        task.receive_forward(wait(future, timeout, "forward", "no"))
    return task.submit_backward()


async def forward_backward_custom_async(
    client: Any,
    data: Sequence[Any],
    objective: CompositeLoss | TermFn,
    *,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
    logprobs: Sequence[Any] | None = None,
    max_drift: float = 0.05,
    on_drift: Literal["warn", "raise", "ignore"] = "warn",
    state: PyTree = None,
    key: Array | None = None,
    timeout: float | None = None,
) -> CustomFuture:
    """`forward_backward_custom` for event loops.

    ``future = await forward_backward_custom_async(...)`` comes back when the backward request has been
    handed to the client, and ``result = await future`` with the reply. Compiling and computing happen in
    a thread. Cancelled before the backward request is handed over, it sends none.
    """
    composed = as_objective(objective, regularizers, track_grad_norms)
    task = _Task(client, data, composed, logprobs, max_drift, on_drift, state, key)
    try:
        if task.logprobs is None:
            future = await asyncio.to_thread(task.submit_forward)
            task.receive_forward(await _arrival(future, timeout, "forward", "no"))
        return await asyncio.to_thread(task.submit_backward)
    except asyncio.CancelledError:
        task.cancel()
        raise


class CustomFuture:
    """The result of a step whose backward request is on its way."""

    def __init__(self, task: _Task, future: Any) -> None:
        self._task = task
        self._future = future
        self._lock = threading.Lock()
        self._outcome: CustomResult | BaseException | None = None

    def result(self, timeout: float | None = None) -> CustomResult:
        """The result; blocks until the server has answered.

        Raises:
          RequestTimedOut: not within ``timeout`` seconds; asking again waits on, and sends nothing.
          RemoteError: see `forward_backward_custom`.
        """
        if self._outcome is None:
            return self._finish(wait(self._future, timeout, "backward", "maybe"))
        return self._settled()

    async def result_async(self, timeout: float | None = None) -> CustomResult:
        """`result`, for event loops."""
        if self._outcome is None:
            return self._finish(await _arrival(self._future, timeout, "backward", "maybe"))
        return self._settled()

    def __await__(self) -> Any:
        return self.result_async().__await__()

    def done(self) -> bool:
        """Whether `result` would return at once. False where the client's future cannot tell."""
        return self._outcome is not None or bool(getattr(self._future, "done", lambda: False)())

    @property
    def output(self) -> CustomLossOutput:
        """What every term did: known before the server has answered."""
        return self._task.output

    def _finish(self, reply: Any) -> CustomResult:
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = self._task.finish(reply)
                except Exception as error:
                    self._outcome = error
        return self._settled()

    def _settled(self) -> CustomResult:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class _Task:
    """One step, in the order in which it happens. Everything is checked as early as it can be."""

    output: CustomLossOutput

    def __init__(
        self,
        client: Any,
        data: Sequence[Any],
        objective: CompositeLoss,
        logprobs: Sequence[Any] | None,
        max_drift: float,
        on_drift: str,
        state: PyTree,
        key: Array | None,
    ) -> None:
        for name in ("forward", "forward_backward"):
            if not callable(getattr(client, name, None)):
                raise TypeError(f"client: {type(client).__name__} has no {name}(data, loss_fn)")
        if on_drift not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_drift is 'warn', 'raise' or 'ignore', got {on_drift!r}")
        self.client, self.objective = client, objective
        self.max_drift, self.on_drift = max_drift, on_drift
        self.state, self.key = state, key
        self._rows = rows = wire.read(data)
        self.data = list(data)  # the caller may go on with theirs
        self.targets = [row[wire.TARGETS] for row in rows]
        self.batch = TokenBatch.pack(rows)
        self.logprobs = None if logprobs is None else _given(logprobs, self.targets)
        self._lock = threading.Lock()
        self._cancelled = False
        dry_run(objective, self.batch, self.targets, state, key)

    def submit_forward(self) -> Any:
        pairs = zip(self.data, self._rows, strict=True)
        data = [wire.with_weights(datum, wire.own_weights(row)) for datum, row in pairs]
        return _submit(self.client.forward, data, "forward")

    def receive_forward(self, reply: Any) -> None:
        self.logprobs = wire.logprobs_of(reply, self.targets, "forward", "no")

    def submit_backward(self) -> CustomFuture:
        assert self.logprobs is not None  # received, or given
        done = linearize(self.objective, self.batch, self.logprobs, self.state, self.key)
        self.output = done.output
        pairs = zip(self.data, done.gradients, strict=True)
        data = [wire.with_weights(datum, -gradient) for datum, gradient in pairs]
        with self._lock:
            if self._cancelled:
                raise concurrent.futures.CancelledError
            return CustomFuture(self, _submit(self.client.forward_backward, data, "backward"))

    def cancel(self) -> None:
        """Send no backward request any more. Where one is being handed over this waits for it."""
        with self._lock:
            self._cancelled = True

    def finish(self, reply: Any) -> CustomResult:
        assert self.logprobs is not None
        after = wire.logprobs_of(reply, self.targets, "backward", "yes")
        drift = Drift(*drift_between(self.batch, self.logprobs, after))
        if drift.mean > self.max_drift:
            self._drifted(drift)
        metrics = self.output.to_flat_dict() | dict(getattr(reply, "metrics", None) or {})
        return CustomResult(self.output, metrics, self.logprobs, drift, reply)

    def _drifted(self, drift: Drift) -> None:
        what = (
            f"the model's logprobs differ by {drift.mean:.3g} nats in the mean (at most {drift.max:.3g}) "
            f"from those that the gradient was computed at, and max_drift is {self.max_drift:g}. They came "
            f"from other weights (an optimizer step in between?), or from a sampler that computes otherwise"
        )
        if self.on_drift == "raise":
            raise LogprobDrift(what, step="backward", gradient_applied="yes")
        if self.on_drift == "warn":
            warnings.warn(what, stacklevel=5)


def _given(logprobs: Sequence[Any], targets: Sequence[np.ndarray]) -> list[np.ndarray]:
    if len(logprobs) != len(targets):
        raise ValueError(f"logprobs= has {len(logprobs)} arrays for {len(targets)} datums")
    arrays = []
    for i, (given, target) in enumerate(zip(logprobs, targets, strict=True)):
        array = to_numpy(given).astype(np.float32)
        if array.shape != target.shape:
            raise ValueError(
                f"logprobs=, datum {i}: has shape {array.shape}, but {wire.TARGETS!r} has {target.shape}"
            )
        if not np.isfinite(array).all() or (array.size and array.max() > 1e-3):
            raise ValueError(f"logprobs=, datum {i}: logprobs are finite and ≤ 0")
        arrays.append(array)
    return arrays


def _submit(method: Any, data: list[Any], step: Step) -> Any:
    try:
        return method(data, LOSS)
    except _TIMEOUTS as error:
        raise _timed_out(step, "maybe" if step == "backward" else "no", None) from error
    except Exception as error:
        applied: Applied = "no" if step == "forward" or isinstance(error, TypeError | ValueError) else "maybe"
        raise _failed(error, step, applied) from error


def wait(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    """The reply to a request, or the `RemoteError` that says what became of it."""
    if not callable(getattr(future, "result", None)):
        return future  # a client that answers at once
    try:
        return future.result() if timeout is None else future.result(timeout)
    except _TIMEOUTS as error:
        raise _timed_out(step, applied, timeout) from error
    except Exception as error:
        raise _failed(error, step, applied) from error


async def _arrival(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    if isinstance(future, concurrent.futures.Future):
        reply = asyncio.wrap_future(future)
    elif inspect.isawaitable(future):
        reply = asyncio.ensure_future(future)
    elif callable(getattr(future, "result", None)):
        reply = asyncio.ensure_future(asyncio.to_thread(future.result))
    else:
        return future  # a client that answers at once
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.shield(reply)  # who gives up waiting does not take the request back
    except _TIMEOUTS as error:
        raise _timed_out(step, applied, timeout) from error
    except Exception as error:
        raise _failed(error, step, applied) from error


def _timed_out(step: Step, applied: Applied, timeout: float | None) -> RequestTimedOut:
    within = "" if timeout is None else f" within {timeout:g} s"
    return RequestTimedOut(f"no answer{within}", step=step, gradient_applied=applied)


def _failed(error: BaseException, step: Step, applied: Applied) -> RequestFailed:
    status = getattr(error, "status_code", None)
    what = f"{type(error).__name__}{'' if status is None else f' (status {status})'}: {error}"
    return RequestFailed(what, step=step, gradient_applied=applied)


def _inside_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return not _in_notebook()  # which always has a running loop, and whose cells may block


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython  # type: ignore[import-not-found]
    except ImportError:
        return False
    shell = get_ipython()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")
