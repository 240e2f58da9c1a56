"""One JSON object a line: every step, and what happened between the steps."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxreg.base.events import Event
from jaxreg.core.output import flat
from jaxreg.telemetry.lines import LineFile

NOTES = frozenset(
    {"custom_loss.exception", "server.exception", "compile", "warning", "regularizer.compute.exception"}
)
NOTED = ("term", "kind", "message", "program", "changed", "on_error")
NAN = math.nan  # what is looked up and is not there equals nothing

# One encoder for all lines. ASCII, because readers differ in what else than a newline ends a line.
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class JSONL:
    """A handler that appends every step's report to a file, a line each, and notes what happened besides.

    A step: ``step``, ``time`` (seconds since 1970), the keys of ``to_dict()``, ``metrics`` (what the loop
    logged besides) and ``timings`` (seconds). A note has the key ``event``: a failed step or host term, a
    compile, a warning. It is strict JSON: a number that is not finite is null.

    Several threads and processes may append to one file. Where the disk is full, lines wait until there is
    room again, and the trouble is logged; see `jaxreg.telemetry.lines` for what is guaranteed. A file that is
    there is gone on with: the torn line of a run that was killed is cut off, and a run resumed from an older
    checkpoint just appends, since readers let the later line of a step win. `read_run` reads it.

    Args:
      path: the file; it and its folder are made where they are missing.
      backlog: how many lines wait for room at most; then the oldest are dropped.

    Attributes:
      last_step: the step of the file's last step record when it was opened, None where there is none: from
        which a loop goes on.

    Raises:
      OSError: the file cannot be opened for appending.
      ValueError: it is something else than a file of JSON lines.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import JSONL
      >>> loss, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "run.jsonl")
      ...     with jr.telemetry.attached(JSONL(path)):
      ...         jr.telemetry.log(out, step=0, metrics={"optim/learning_rate": 1e-3})
      ...     print(path.read_text())
      {"step":0,"time":...,"loss_total":3.0,...,"metrics":{"optim/learning_rate":0.001}}
    """

    _when_slow: ClassVar[str | None] = "write the file to a disk of this machine"

    def __init__(self, path: str | os.PathLike[str], *, backlog: int = 10_000) -> None:
        self._file = LineFile(Path(path), backlog)
        self.last_step = _last_step(self._file.from_the_end())

    def __call__(self, event: Event) -> None:
        """Append the event's line, if it has one."""
        if event.name == "custom_loss.stop":
            self._file.append(encode(_record(event)))
        elif event.name in NOTES:
            self._file.append(encode(_note(event)))

    def close(self) -> None:
        """Write the lines that wait, if there is room, and close the file; events are then ignored."""
        self._file.close()


def _record(event: Event) -> dict[str, Any]:
    report = event.metadata["report"]
    record = {"step": event.step, "time": event.time, **report}
    known = flat(report)
    own = {
        name: _number(value)
        for name, value in event.metadata.get("metrics", {}).items()
        if (reported := known.get(name, NAN)) != value and not (reported is None and _number(value) is None)
    }
    if own:
        record["metrics"] = own
    if event.measurements:
        record["timings"] = {name: _number(value) for name, value in event.measurements.items()}
    return record


def _note(event: Event) -> dict[str, Any]:
    about = event.metadata
    note: dict[str, Any] = {"step": event.step, "time": event.time, "event": event.name}
    note |= {key: about[key] for key in NOTED if key in about}
    if (error := about.get("error")) is not None:
        note["error"] = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    if "duration" in event.measurements:
        note["seconds"] = _number(event.measurements["duration"])
    return note


def encode(record: Mapping[str, Any]) -> bytes:
    """A line of strict JSON. What JSON has no word for is null if it is a number, else its text.

    Example:
      >>> encode({"step": 1, "value": float("inf"), "path": ("a", 2)})
      b'{"step":1,"value":null,"path":["a",2]}\\n'
    """
    try:
        line = _ENCODER.encode(record)
    except (TypeError, ValueError):
        line = _ENCODER.encode(_plain(record))
    return line.encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and getattr(value, "ndim", None) != 0:
        return [_plain(entry) for entry in value]
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return _finite(float(value))
    except (TypeError, ValueError):
        return str(value)


def _number(value: Any) -> float | None:
    """A float; None for what is not finite, or no number at all."""
    try:
        return _finite(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _last_step(lines: Iterable[bytes]) -> int | None:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "event" not in record and type(record.get("step")) is int:
            return record["step"]
    return None
