"""Scalars for TensorBoard, through its own writer."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from jaxreg.base.events import Event
from jaxreg.base.extras import need

FLUSH = 10.0  # seconds between what is shown; TensorBoard's own writer waits for two minutes


class TensorBoard:
    """A handler that writes every step's metrics, by their flat names, and its timings under ``timing/``.

    Numbers that are not finite are written as they are. A step without a number gets the one after the last.

    TensorBoard's own reader finds them among the tensors, of which it keeps ten unless it is told otherwise:
    ``EventAccumulator(logdir, {"tensors": 0}).Reload().Tensors("loss/total")``.

    Args:
      logdir: the run's folder, which ``tensorboard --logdir`` reads.

    Raises:
      ImportError: TensorBoard is not installed: ``pip install "jaxreg[tensorboard]"``.

    Example:
      >>> import jaxreg as jr
      >>> from jaxreg.telemetry import TensorBoard
      >>> def train():
      ...     with jr.telemetry.attached(TensorBoard("runs/terms")):
      ...         ...  # the loop, which calls jr.telemetry.log(out, step=step)
    """

    _when_slow: ClassVar[str | None] = "write to a disk of this machine"

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        summary = need("tensorboard.summary", "tensorboard", "TensorBoard")
        self._writer = summary.Writer(os.fspath(logdir))
        self._closed = False
        self._last, self._flushed = -1, time.monotonic()

    def __call__(self, event: Event) -> None:
        """Write a step's scalars."""
        if event.name != "custom_loss.stop" or self._closed:
            return
        self._last = step = self._last + 1 if event.step is None else event.step
        timings = {f"timing/{name}": seconds for name, seconds in event.measurements.items()}
        for name, value in (*event.metadata["metrics"].items(), *timings.items()):
            self._writer.add_scalar(name, value, step, wall_time=event.time)
        if time.monotonic() - self._flushed > FLUSH:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        """Write what is buffered, and close the files; events are then ignored."""
        if not self._closed:
            self._closed = True
            self._writer.close()
