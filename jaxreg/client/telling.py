"""What listeners hear of a step: that it begins, and how it went or what went wrong."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from jaxreg.base.events import emit, listening
from jaxreg.client.work import Work
from jaxreg.core.output import CustomLossOutput
from jaxreg.events.log import Inputs, log


class Telling:
    """A context that a step runs in: an error that leaves it is told, and ends the step's host terms."""

    def __init__(self, step: int | None) -> None:
        self.inputs: Inputs | None = None  # what it is computed from, once that is known
        self._step = step
        self._work: Work | None = None  # until it begins
        self._laps: dict[str, float] = {}
        self._over = threading.Lock()  # taken by whoever tells the end of it, once

    def begin(self, work: Work) -> None:
        """The step begins: its data and terms are in order."""
        self._work = work
        self._began = self._last = time.perf_counter()
        if listening():
            tokens = int(np.sum(work.packed.batch.lengths))
            about = {"terms": work.names, "datums": len(work.packed.data), "tokens": tokens}
            emit("custom_loss.start", step=self._step, metadata=about)

    def lap(self, name: str) -> None:
        """A part of the step is over, which began where the last one ended."""
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def stop(self, output: CustomLossOutput) -> None:
        """The step has its loss and gradient."""
        if self._over.acquire(blocking=False) and listening():
            times = {"duration": time.perf_counter() - self._began, **self._laps}
            log(output, step=self._step, inputs=self.inputs, measurements=times)

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._work:
            self._work.calls.cancel()
        if error is not None and self._over.acquire(blocking=False):
            times = {}
            if self._work:
                self._work.calls.tell_the_rest()
                times["duration"] = time.perf_counter() - self._began
            about = {"error": error, "inputs": self.inputs}
            emit("custom_loss.exception", step=self._step, measurements=times, metadata=about)
