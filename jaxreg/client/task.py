"""One step with a remote model, taken apart into what happens before, between and after the requests."""

from __future__ import annotations

import concurrent.futures
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxreg.base.arrays import to_numpy
from jaxreg.base.events import emit
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.values import HIGHEST
from jaxreg.client import wire
from jaxreg.client.errors import LogprobDrift
from jaxreg.client.evaluation import Evaluation
from jaxreg.client.local import drift_between, packed
from jaxreg.client.requests import LOSS, submit
from jaxreg.client.slots import Slots
from jaxreg.client.types import CustomResult, Drift
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput


class Task:
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
        top_k: str,
        state: PyTree,
        key: Array | None,
        step: int | None,
    ) -> None:
        for name in ("forward", "forward_backward"):
            if not callable(getattr(client, name, None)):
                raise TypeError(f"client: {type(client).__name__} has no {name}(data, loss_fn)")
        if on_drift not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_drift is 'warn', 'raise' or 'ignore', got {on_drift!r}")
        if top_k not in ("native", "unrolled"):
            raise ValueError(f"top_k is 'native' or 'unrolled', got {top_k!r}")
        self.client, self.step = client, step
        self.max_drift, self.on_drift = max_drift, on_drift
        self._rows = rows = wire.read(data)
        self.data = list(data)  # the caller may go on with theirs
        self.targets = [row[wire.TARGETS] for row in rows]
        self.batch = packed(rows)
        self.slots = Slots(self.targets, top_k == "unrolled")
        self.logprobs = (
            None
            if logprobs is None
            else _given(logprobs, self.targets, self.batch.unpack(self.batch.counted))
        )
        self._lock = threading.Lock()
        self._phase: Literal["before", "sending", "cancelled"] = "before"
        self._evaluation = Evaluation(objective, self.data, self.batch, self.targets, state, key, self.step)

    def __enter__(self) -> Task:
        """The step begins; what is raised until the backward is handed over ends it."""
        self._evaluation.begin()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._evaluation.fail(error)

    def submit_forward(self) -> Any:
        """Ask for the logprobs; the client's future of the reply."""
        data = self.slots.spread(self.data, [wire.own_weights(row) for row in self._rows])
        return submit(self.client.forward, (data, LOSS), "forward", "no")

    def receive_forward(self, reply: Any) -> None:
        """Check the reply, and read it."""
        self.logprobs = self.slots.gather(wire.logprobs_of(reply, self.slots.targets, "forward", "no"))

    def submit_backward(self) -> Any:
        """Evaluate, differentiate, and hand the gradient over; the client's future of the reply."""
        assert self.logprobs is not None  # received, or given
        done = self._evaluation.at(self.logprobs)
        self.output = done.output
        data = self.slots.spread(self.data, [-gradient for gradient in done.gradients])
        with self._lock:
            if self._phase == "cancelled":
                raise concurrent.futures.CancelledError
            self._phase = "sending"  # The lock is not held meanwhile: who cancels must not wait for it.
        future = submit(self.client.forward_backward, (data, LOSS), "backward", "maybe")
        self._evaluation.stop()
        return future

    def cancel(self) -> bool:
        """Send no backward request any more; False where one is on its way already."""
        with self._lock:
            if self._phase == "sending":
                return False
            self._phase = "cancelled"
        self._evaluation.cancel()
        return True

    def failed(self, error: BaseException) -> None:
        """Tell that the backward request failed, after the loss was told."""
        emit("server.exception", step=self.step, metadata={"error": error})

    def finish(self, reply: Any) -> CustomResult:
        """Check the reply to the backward, and put the result together."""
        assert self.logprobs is not None
        after = self.slots.gather(wire.logprobs_of(reply, self.slots.targets, "backward", "yes"))
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


def _given(
    logprobs: Sequence[Any], targets: Sequence[np.ndarray], counted: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """One float32 array a datum; a placeholder at a token that does not count becomes 0."""
    if len(logprobs) != len(targets):
        raise ValueError(f"logprobs= has {len(logprobs)} arrays for {len(targets)} datums")
    arrays = []
    for i, (given, target, counts) in enumerate(zip(logprobs, targets, counted, strict=True)):
        array = to_numpy(given).astype(np.float32)
        if array.shape != target.shape:
            raise ValueError(
                f"logprobs=, datum {i}: has shape {array.shape}, but {wire.TARGETS!r} has {target.shape}"
            )
        wrong = ~np.isfinite(array) | (array > HIGHEST)
        if wrong[counts].any():
            raise ValueError(f"logprobs=, datum {i}: logprobs are finite and ≤ 0")
        arrays.append(np.where(wrong, np.float32(0), array) if wrong.any() else array)
    return arrays
