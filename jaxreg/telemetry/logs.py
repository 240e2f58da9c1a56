"""A readable line a step, through Python's own logging."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxreg.base.events import Event


class Logging:
    """A handler that writes one line a step, and failures, warnings and compiles, to a logger.

    A step's line has the total, the base loss and each term's contribution, and in brackets its share of the
    gradient where norms are tracked: its weighted norm over the sum of all of them. Failures come at ERROR
    (host terms that are made up for, at WARNING), warnings at WARNING, compiles at INFO.

    Args:
      logger: a logger, or its name.
      level: the level of a step's line.
      every: write the steps that this divides; steps without a number are counted.

    Example:
      >>> import sys, jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import Logging
      >>> logger = logging.getLogger("an example")
      >>> logger.addHandler(logging.StreamHandler(sys.stdout)); logger.setLevel(logging.INFO)
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [
      ...     dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=0.5)], track_grad_norms=True)
      >>> (loss, out), grads = objective.value_and_grad(jnp.ones(3))
      >>> with jr.telemetry.attached(Logging(logger)):
      ...     jr.telemetry.log(out, step=7)
      step 7: loss 4.5 = base 3 (50%) + l2 1.5 (50%)
    """

    _when_slow: ClassVar[str | None] = (
        "let its logger have a logging.handlers.QueueHandler, whose listener writes in a thread"
    )

    def __init__(
        self, logger: str | logging.Logger = "jaxreg", level: int = logging.INFO, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of steps, at least 1; got {every}")
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._level, self._every = level, every
        self._unnumbered = 0

    def __call__(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        if event.name == "custom_loss.stop":
            if self._is_due(event.step) and self._logger.isEnabledFor(self._level):
                self._logger.log(self._level, "%s: %s", _at(event), _step(event.metadata["report"]))
        elif event.name.endswith(".exception"):
            self._failed(event)
        elif event.name == "compile.start":
            self._logger.info("%s: compiling ...", event.metadata.get("program"))
        elif event.name == "compile":
            seconds, about = event.measurements.get("duration", 0.0), event.metadata
            changed = "; ".join(about.get("changed", ()))
            self._logger.info("%s: compiled in %.3g s: %s", about.get("program"), seconds, changed)
        elif event.name == "warning" and not _reaches("jaxreg.warnings", self._logger):
            self._logger.warning("%s: %s", _at(event), event.metadata.get("message"))

    def _is_due(self, step: int | None) -> bool:
        if step is None:
            step, self._unnumbered = self._unnumbered, self._unnumbered + 1
        return step % self._every == 0

    def _failed(self, event: Event) -> None:
        about = event.metadata
        error = about.get("error")
        made_up_for = about.get("on_error", "raise") != "raise"
        self._logger.log(
            logging.WARNING if made_up_for else logging.ERROR,
            "%s: %s failed: %s: %s",
            _at(event),
            {"custom_loss.exception": "it", "server.exception": "the backward request"}.get(
                event.name, f"host term {about.get('term')!r}"
            ),
            type(error).__name__,
            error,
        )


def _at(event: Event) -> str:
    return "step" if event.step is None else f"step {event.step}"


def _step(report: Mapping[str, Any]) -> str:
    """``loss 4.5 = base 3 (50%) + l2 1.5 (50%)``."""
    base, terms = report["base_loss"], report["regularizers"]
    pulls = [base["grad_norm"], *(term["grad_norm_weighted"] for term in terms.values())]
    whole = sum(pull for pull in pulls if pull is not None)
    added = [("base", base["value"]), *((name, term["contribution"]) for name, term in terms.items())]
    parts = (
        f"{name} {_number(value)}" + (f" ({pull / whole:.0%})" if whole and pull is not None else "")
        for (name, value), pull in zip(added, pulls, strict=True)
    )
    line = f"loss {_number(report['loss_total'])} = {' + '.join(parts)}"
    return line + (f"; not finite: {', '.join(report['nonfinite'])}" if "nonfinite" in report else "")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _reaches(name: str, logger: logging.Logger) -> bool:
    """Whether what is logged under the name comes to the logger's handlers, too: `Warnings` logs its own."""
    above: logging.Logger | None = logging.getLogger(name)
    while above is not None and above is not logger:
        above = above.parent if above.propagate else None
    return above is logger
