"""Metrics for Weights & Biases, into a run that the user made."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxreg.base.events import Event
from jaxreg.base.extras import need

STEP = "step"
LONGEST_TITLE = 63  # letters; longer ones are refused


class WandB:
    """A handler that logs every step's metrics to a run, by their flat names, and timings under ``timing/``.

    The step is logged as the metric ``step``, and each metric is defined to be drawn over it. W&B's own count
    only ever grows, and drops what is logged for a step that has passed; so a resumed run and a step that
    comes late are kept. A step without a number gets the one after the last.

    Args:
      run: what ``wandb.init(...)`` gave. It stays open when the handler is detached: finish it yourself.
      alerts: send the warnings of `Warnings` with ``run.alert``, too.

    Raises:
      ImportError: W&B is not installed: ``pip install "jaxreg[wandb]"``.
      TypeError: this is no run.

    Example:
      >>> import jaxreg as jr
      >>> from jaxreg.telemetry import WandB
      >>> def train():
      ...     with wandb.init(project="terms") as run, jr.telemetry.attached(WandB(run)):
      ...         ...  # the loop, which calls jr.telemetry.log(out, step=step)
    """

    _when_slow: ClassVar[str | None] = 'wandb.init(mode="offline") does not wait for the network'

    def __init__(self, run: Any, *, alerts: bool = False) -> None:
        need("wandb", "wandb", "WandB")
        if not callable(getattr(run, "define_metric", None)):
            raise TypeError(f"WandB takes the run that wandb.init() gives, not {type(run).__name__}")
        self._run, self._alerts = run, alerts
        self._defined: set[str] = set()
        self._last = -1
        run.define_metric(STEP)

    def __call__(self, event: Event) -> None:
        """Log a step's metrics, or send a warning."""
        if event.name == "custom_loss.stop":
            self._last = step = self._last + 1 if event.step is None else event.step
            timings = {f"timing/{name}": seconds for name, seconds in event.measurements.items()}
            numbers = {**event.metadata["metrics"], **timings}
            self._define(numbers)
            self._run.log({**numbers, STEP: step})
        elif event.name == "warning" and self._alerts:
            about = event.metadata
            title = " ".join(str(about[key]) for key in ("kind", "term") if about.get(key))
            self._run.alert(title=title[:LONGEST_TITLE], text=str(about.get("message")), level="WARN")

    def _define(self, names: dict[str, Any]) -> None:
        """Draw them over the step. One by one: in "reg/*", the star does not go beyond the next slash."""
        for name in names.keys() - self._defined:
            self._defined.add(name)
            if "*" not in name:  # which would be a pattern, and is refused; it is logged all the same
                self._run.define_metric(name, step_metric=STEP)
