"""From an objective's output to the events of a step."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreg.base.events import emit, listening
from jaxreg.base.types import Array, PyTree
from jaxreg.core.output import CustomLossOutput
from jaxreg.core.spec import RESERVED_METRICS


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What a step was computed from, for the flight recorder. References, not copies.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective, x = jr.compose(lambda x, batch: jnp.sum(x**2)), jnp.ones(3)
      >>> loss, out = objective(x)
      >>> jr.telemetry.log(out, step=0, inputs=jr.telemetry.Inputs(objective, x))
    """

    objective: Any
    x: PyTree
    batch: PyTree = None
    state: PyTree = None
    key: Array | None = None


def log(
    output: CustomLossOutput,
    *,
    step: int | None = None,
    inputs: Inputs | None = None,
    metrics: Mapping[str, float] | None = None,
    measurements: Mapping[str, float] | None = None,
) -> None:
    """Tell the attached handlers what every term did in a step: one ``regularizer.compute.stop`` a term,
    then ``custom_loss.stop``. With no handler attached it does nothing.

    The remote client calls it itself. A training loop of your own calls it once a step. It reads numbers,
    so it waits for the device: to keep one busy, log step n after step n + 1 was dispatched.

    Args:
      output: one step's output, outside jit.
      step: the training step.
      inputs: what the step was computed from, for `FlightRecorder`:
        ``Inputs(objective, params, batch, state, key)``.
      metrics: further numbers by flat name, such as ``{"optim/learning_rate": 1e-3}``.
      measurements: durations by name, in seconds.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> loss, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> with jr.telemetry.attached(lambda event: print(event.step, event.metadata["metrics"])):
      ...     jr.telemetry.log(out, step=7)
      7 {'loss/total': 3.0, ...}
    """
    if not listening():
        return
    if not isinstance(output, CustomLossOutput):
        raise TypeError(
            f"log takes the output of a step, a CustomLossOutput, got {type(output).__name__}; of "
            f"`(loss, out), gradient = objective.value_and_grad(...)` it is `out`"
        )
    step = None if step is None else operator.index(step)  # a NumPy or JAX integer, as state["step"] is
    host = output.on_host()
    report, flat = host.to_dict(), host.to_flat_dict()
    for name, term in report["regularizers"].items():
        emit("regularizer.compute.stop", step=step, measurements=_of_term(term), metadata={"term": name})
    emit(
        "custom_loss.stop",
        step=step,
        measurements=dict(measurements or {}),
        metadata={
            "output": host,
            "report": report,
            "metrics": flat | dict(metrics or {}),
            "inputs": inputs,
            "state_step": _step_of(output.state),
        },
    )


def _step_of(state: PyTree) -> int | None:
    known = isinstance(state, Mapping) and np.ndim(state.get("step", ())) == 0 and "step" in state
    return int(state["step"]) if known else None


def _of_term(term: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: term[key] for key in RESERVED_METRICS if term[key] is not None}
    if (seconds := term["custom"].get("host_seconds")) is not None:
        numbers["duration"] = seconds
    return numbers
