"""A recorded step once more, on any machine: what it gives now, and what went wrong first."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from jaxreg.base.msgpack import MAX_BYTES
from jaxreg.base.types import PyTree
from jaxreg.core.objective import CompositeLoss
from jaxreg.host.part import part
from jaxreg.recorder.diagnose import Finding, as_arrays, diagnose
from jaxreg.recorder.recorder import RecordedStep, read_recording

CLOSE = 1e-3  # relative: another machine rounds otherwise


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was computed again; ``str()`` of it is a report to read.

    Attributes:
      recorded: the step as it was recorded.
      metrics: what it gives now, by flat name.
      findings: what is not finite, the first cause first.
      differing: the names of the metrics that differ by more than rounding between then and now.
    """

    recorded: RecordedStep
    metrics: dict[str, float]
    findings: list[Finding]
    differing: list[str]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def replay(
    path: str | os.PathLike[str],
    objective: CompositeLoss | str,
    *,
    step: int | None = None,
    like: Mapping[str, PyTree] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Replay:
    """Recompute a step of a flight recording, with the weights that it had.

    Args:
      path: a file that `FlightRecorder` wrote.
      objective: the objective, or ``"module:attribute"``: one, or a function without arguments that makes
        it. Its code runs; nothing in the file does. Host terms are left out.
      step: which step; by default the last one, which is the one that went wrong.
      like: for pytrees of your own classes, of which a file keeps the leaves alone: one of the same
        structure for ``"x"``, ``"batch"`` or ``"state"``.
      max_bytes: a larger file is refused.

    Raises:
      OSError, ValueError: the file is no recording, or has no such step; the objective has other terms,
        which are named; or what was recorded does not fit it.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import FlightRecorder, Inputs, attached, log, replay
      >>> objective = jr.compose(lambda x, batch: -batch.mean(x), [
      ...     dict(name="log", fn=lambda x, batch: batch.mean(jnp.log(batch["p"])), weight=0.1)])
      >>> batch = jr.TokenBatch.pack([{"p": [0.5, 0.5]}, {"p": [0.5, float("inf"), 0.5]}])
      >>> x = jnp.zeros(batch.shape)
      >>> with attached(FlightRecorder(tempfile.mkdtemp())) as (recorder,):
      ...     log(objective(x, batch)[1], step=7, inputs=Inputs(objective, x, batch))
      >>> print(replay(recorder.written[0], objective).findings[0])
      the data 'p', datum 1, token 1: inf
    """
    steps = read_recording(path, max_bytes=max_bytes)
    recorded = _chosen(steps, step, path)
    whole = named_objective(objective) if isinstance(objective, str) else objective
    lean, host = part(whole)
    left_out = {term.name for term in host}
    lean = _with_recorded_weights(lean, recorded, left_out)
    inputs = recorded.inputs(lean, like)
    try:
        x = as_arrays(inputs.x, inputs.batch)
        (_, output), _ = lean.value_and_grad(x, inputs.batch, state=inputs.state, key=inputs.key)
        metrics = output.to_flat_dict()
        findings = diagnose(dataclasses.replace(inputs, x=x))
    except Exception as error:
        raise ValueError(
            f"step {recorded.step} cannot be recomputed with this objective: {type(error).__name__}: {error}"
        ) from error
    totals = {"loss/total", "loss/regularizer_total", "grad_norm/total"} if left_out else set()
    differing = [
        name
        for name, number in metrics.items()
        if name in recorded.metrics and name not in totals and not _close(number, recorded.metrics[name])
    ]
    return Replay(recorded, metrics, findings, differing)


def named_objective(name: str) -> CompositeLoss:
    """The objective of ``"module:attribute"``.

    Raises:
      ValueError: there is none; it says what is missing.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"an objective is named module:attribute, such as train:objective; got {name!r}")
    found = _imported(module_name, name)
    try:
        for part_name in attribute.split("."):
            found = getattr(found, part_name)
    except AttributeError:
        raise ValueError(f"{name!r}: {module_name!r} has no {attribute!r}") from None
    try:
        made = found() if callable(found) and not isinstance(found, CompositeLoss) else found
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name!r} was called to make an objective, and {_raised(error)}") from error
    if not isinstance(made, CompositeLoss):
        raise ValueError(f"{name!r} is no objective (what compose returns) but {type(made).__name__}")
    return made


def _imported(module_name: str, name: str) -> Any:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"{name!r}: {module_name!r} is no name of a module, which has dots and no slashes")
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        hint = "run this in the folder where it lies, or put that on PYTHONPATH"
        if module_name.endswith(".py"):
            hint = f"name the module and not its file: {name.replace('.py:', ':')}"
        raise ValueError(
            f"{name!r}: the module {module_name!r} cannot be imported ({error}); {hint}"
        ) from error
    except (Exception, SystemExit) as error:  # its own code: a script that trains, or reads arguments
        raise ValueError(f"{name!r}: importing the module {module_name!r} {_raised(error)}") from error


def _raised(error: BaseException) -> str:
    """What an error of the user's own code is, and where."""
    *_, last = traceback.extract_tb(error.__traceback__)
    own = last.filename != __file__ and not isinstance(error, SyntaxError)  # which says it by itself
    where = f" ({os.path.basename(last.filename)}, line {last.lineno})" if own else ""
    return f"raised {type(error).__name__}: {error}{where}"


def _chosen(steps: list[RecordedStep], step: int | None, path: object) -> RecordedStep:
    if step is None:
        return steps[-1]
    for recorded in reversed(steps):
        if recorded.step == step:
            return recorded
    raise ValueError(f"{path} has no step {step}; it has {[recorded.step for recorded in steps]}")


def _with_recorded_weights(
    objective: CompositeLoss, recorded: RecordedStep, left_out: set[str]
) -> CompositeLoss:
    if not recorded.weights:  # lost, or none
        return objective
    there, here = set(recorded.weights) - left_out, set(objective.names)
    if there != here:
        raise ValueError(
            f"the recording is of an objective with other terms: only there {sorted(there - here)}, only in "
            f"the one given {sorted(here - there)}"
        )
    finite = {name: weight for name, weight in recorded.weights.items() if name in here}
    return objective.with_weights(finite)


def _close(now: float, then: float) -> bool:
    if math.isfinite(now) and math.isfinite(then):
        return math.isclose(now, then, rel_tol=CLOSE, abs_tol=1e-6)
    return math.isnan(now) == math.isnan(then) and (math.isnan(now) or now == then)


def _lines(done: Replay) -> Iterator[str]:
    recorded = done.recorded
    yield f"step {recorded.step}" + (f", which raised {recorded.error}" if recorded.error else "")
    yield ""
    rows = [("", "recorded", "now")]
    rows += [(name, _shown(recorded.metrics.get(name)), _shown(now)) for name, now in done.metrics.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, then, now in rows:
        mark = "  differs" if name in done.differing else ""
        yield f"{name:<{widths[0]}}  {then:>{widths[1]}}  {now:>{widths[2]}}{mark}"
    yield ""
    if not done.findings:
        yield "everything is finite here"
        return
    yield f"first: {done.findings[0]}"
    yield from (f"then:  {finding}" for finding in done.findings[1:20])
    if len(done.findings) > 20:
        yield f"and {len(done.findings) - 20} more"


def _shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.6g}"


def summary(path: str | os.PathLike[str]) -> str:
    """What a flight recording holds, in a line a step."""
    lines = []
    for recorded in read_recording(path):
        numbers = [name for name, number in recorded.metrics.items() if not math.isfinite(number)]
        bad = f"not finite: {', '.join(numbers)}" if numbers else "finite"
        lines.append(f"step {recorded.step}: {recorded.error or bad}")
    return "\n".join(lines)
