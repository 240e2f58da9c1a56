"""The flight recorder: the last steps in memory, in a file when something goes wrong."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxreg.base import msgpack as _msgpack
from jaxreg.base.events import Event
from jaxreg.base.types import PyTree
from jaxreg.base.version import __version__
from jaxreg.core.objective import CompositeLoss
from jaxreg.events.log import Inputs
from jaxreg.recorder.recording import from_plain, to_plain

LOGGER = logging.getLogger("jaxreg.telemetry")
_STOPPED = (
    KeyboardInterrupt,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
)  # no fault of a step
MAX_DEPTH = 256  # of a recording: a level of a pytree is two of it
FORMAT, VERSION = "jaxreg flight recording", 1


@dataclasses.dataclass(frozen=True)
class RecordedStep:
    """One step of a recording.

    Attributes:
      step: its number, or None.
      metrics: what it reported by flat name; empty where it raised.
      error: what it raised, or None.
      weights: every regularizer's weight in it by name.
      parts: x, batch, state and key as they were stored; see `part`.
    """

    step: int | None
    metrics: dict[str, float]
    error: str | None
    weights: dict[str, float]
    parts: Mapping[str, Any]

    def inputs(self, objective: CompositeLoss, like: Mapping[str, PyTree] | None = None) -> Inputs:
        """What the step was computed from, for this objective.

        Raises:
          jaxreg.telemetry.Lost: a part was not kept, or needs ``like``.
        """
        kept = {name: self.part(name, (like or {}).get(name)) for name in ("x", "batch", "state", "key")}
        return Inputs(objective, **kept)

    def part(self, name: str, like: PyTree = None) -> PyTree:
        """``"x"``, ``"batch"``, ``"state"`` or ``"key"``."""
        return from_plain(self.parts.get(name), name, like)


class FlightRecorder:
    """A handler that keeps the last steps' inputs, weights and outputs in memory and writes them to one
    msgpack file when a number is not finite, when a step raises, or when `dump` is called.

    ``python -m jaxreg replay FILE`` shows what is in the file; with ``--objective module:attribute`` it
    recomputes the step, on any machine, and says which term, datum and token went wrong first.

    With a remote model nothing else is needed. A loop of your own gives `log` the step's inputs. What is
    kept are references to arrays, so keep few steps where they are large; ``copy=True`` takes a copy to
    the host instead, which waits for the device, but survives a jitted function that the arrays are
    donated to.

    Args:
      folder: where the files go; it is made. One file an episode: while every step is bad, one.
      steps: how many steps are kept.
      files: after so many files it writes no more by itself.
      copy: whether arrays are copied to the host at once.

    Raises:
      OSError: the folder cannot be written to.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxreg as jr
      >>> from jaxreg.telemetry import FlightRecorder, Inputs, attached, log, read_recording
      >>> objective = jr.compose(lambda x, batch: jnp.sum(jnp.log(x)))
      >>> with attached(FlightRecorder(tempfile.mkdtemp(), steps=2)) as (recorder,):
      ...     for step, x in enumerate([2.0, 1.0, 0.0]):
      ...         loss, out = objective(jnp.array([x]))
      ...         log(out, step=step, inputs=Inputs(objective, jnp.array([x])))
      >>> [recorded.step for recorded in read_recording(recorder.written[0])]
      [1, 2]
    """

    _when_slow: ClassVar[str | None] = (
        None  # it writes where a step went wrong, and copies where it was told to
    )

    def __init__(
        self, folder: str | os.PathLike[str], *, steps: int = 4, files: int = 8, copy: bool = False
    ) -> None:
        for name, number in (("steps", steps), ("files", files)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} is a whole number ≥ 1, got {number!r}")
        self.written: list[Path] = []
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder):  # a folder that cannot be written to says so now
            pass
        self._files, self._copy = files, copy
        self._kept: collections.deque[dict[str, Any]] = collections.deque(maxlen=steps)
        self._bad = False  # whether the last step was
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Keep a step; write the file if it went wrong."""
        if event.name not in ("custom_loss.stop", "custom_loss.exception"):
            return
        error = event.metadata.get("error")
        inputs: Inputs | None = event.metadata["inputs"]
        if inputs is None or isinstance(error, _STOPPED):
            return
        self._keep(event, inputs, error)
        bad = error is not None or "nonfinite" in event.metadata["report"]
        first, self._bad = bad and not self._bad, bad
        if first and len(self.written) < self._files:
            self._try_to_write("it raised" if error is not None else "a number is not finite", event.step)

    def dump(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write what is kept to a file now.

        Raises:
          OSError: it cannot be written; nothing is left half-written.
          ValueError: there is nothing to write.
        """
        with self._lock:
            kept = list(self._kept)
        if not kept:
            raise ValueError(
                "the flight recorder has no step yet: a loop of your own gives log(..., inputs=Inputs(...))"
            )
        return self._write(kept, "asked for", Path(path) if path else self._path(kept[-1]["step"]))

    def _keep(self, event: Event, inputs: Inputs, error: BaseException | None) -> None:
        held = {name: getattr(inputs, name) for name in ("x", "batch", "state", "key")}
        if self._copy:
            held = jax.tree.map(lambda leaf: np.array(leaf) if _is_array(leaf) else leaf, held)
        entry = {
            "step": event.step,
            "metrics": dict(event.metadata.get("metrics", {})),
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "objective": inputs.objective,
            "held": held,
        }
        with self._lock:
            self._kept.append(entry)

    def _try_to_write(self, reason: str, step: int | None) -> None:
        with self._lock:
            kept = list(self._kept)
        try:
            path = self._write(kept, reason, self._path(step))
        except Exception as error:  # a full disk must not detach the recorder
            LOGGER.error("the flight recording of step %s could not be written: %s", step, error)
        else:
            self.written.append(path)
            LOGGER.warning(
                "step %s: %s; the last %d steps are in %s: python -m jaxreg replay %s --objective "
                "module:attribute",
                step,
                reason,
                len(kept),
                path,
                path,
            )

    def _path(self, step: int | None) -> Path:
        stem = f"step-{'unknown' if step is None else f'{step:08d}'}"
        names = (f"{stem}{f'-{n}' if n else ''}.flight" for n in range(10**6))
        return next(path for name in names if not (path := self._folder / name).exists())

    def _write(self, kept: list[dict[str, Any]], reason: str, path: Path) -> Path:
        entries = [_plain_entry(entry) for entry in kept]
        data = _encoded(entries, reason)
        while len(data) > _msgpack.MAX_BYTES and len(entries) > 1:  # more could not be read again
            del entries[0]
            data = _encoded(entries, reason)
        if len(data) > _msgpack.MAX_BYTES:
            LOGGER.warning("%s is large: read it with max_bytes=%d", path, len(data))
        write_whole(path, data)
        return path


def _encoded(entries: list[dict[str, Any]], reason: str) -> bytes:
    about = {
        "format": FORMAT,
        "version": VERSION,
        "jaxreg": __version__,
        "jax": jax.__version__,
        "time": time.time(),
        "reason": reason,
    }
    return _msgpack.encode({**about, "steps": entries}, max_depth=MAX_DEPTH)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_recording(
    path: str | os.PathLike[str], *, max_bytes: int = _msgpack.MAX_BYTES
) -> list[RecordedStep]:
    """The steps of a flight recording, the last one last. Safe for files from strangers.

    Args:
      path: the file.
      max_bytes: a larger file is refused.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no flight recording, or one of a later version.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxreg as jr
      >>> objective, x = jr.compose(lambda x, batch: jnp.sum(jnp.log(x))), jnp.zeros(1)
      >>> with jr.telemetry.attached(jr.telemetry.FlightRecorder(tempfile.mkdtemp())) as (recorder,):
      ...     loss, out = objective(x)
      ...     jr.telemetry.log(out, step=7, inputs=jr.telemetry.Inputs(objective, x))
      >>> (recorded,) = jr.telemetry.read_recording(recorder.written[0])
      >>> recorded.step
      7
    """
    path = Path(path)
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than max_bytes={max_bytes}")
    data = path.read_bytes()
    try:
        tree = _msgpack.decode(data, max_bytes=max_bytes, max_depth=MAX_DEPTH)
    except _msgpack.DecodeError as error:
        raise ValueError(f"{path} {_what_else(data)}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError(f"{path} {_what_else(data)}")
    if tree.get("version") != VERSION:
        raise ValueError(
            f"{path} is a flight recording of version {tree.get('version')!r}; this jaxreg reads {VERSION}"
        )
    steps = tree.get("steps")
    if not isinstance(steps, list) or not steps or not all(_is_entry(entry) for entry in steps):
        raise ValueError(f"{path}: its steps are not what a flight recording has")
    return [RecordedStep(**entry) for entry in steps]


def _what_else(data: bytes) -> str:
    """What a file is that is no whole recording."""
    if not data:
        return "is empty, and no flight recording"
    if FORMAT.encode() in data[:64]:  # the header, which is written first
        return "is a damaged flight recording: it was cut off or changed, and nothing of it can be read"
    instead = ". It may be a run's file: jaxreg report shows it" if data[:1] == b"{" else ""
    return f"is no flight recording, which FlightRecorder writes{instead}"


def _plain_entry(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": entry["step"],
        "metrics": {name: float(number) for name, number in entry["metrics"].items()},
        "error": entry["error"],
        "weights": _weights(entry),
        "parts": {name: to_plain(tree) for name, tree in entry["held"].items()},
    }


def _weights(entry: dict[str, Any]) -> dict[str, float]:
    """The regularizers' weights, as the step reported them; a step that raised has no report."""
    objective: CompositeLoss = entry["objective"]
    metrics = entry["metrics"]
    if metrics:
        return {name: float(metrics[f"reg/{name}/weight"]) for name in objective.names}
    try:
        weights = objective.weights(entry["held"]["state"] or None)
        return {name: float(weight) for name, weight in weights.items()}
    except Exception as error:  # the state was donated
        LOGGER.warning("the weights of step %s are lost: %s", entry["step"], error)
        return {}


def _is_entry(entry: Any) -> bool:
    def numbers(value: Any) -> bool:
        return isinstance(value, dict) and all(type(number) is float for number in value.values())

    return (
        isinstance(entry, dict)
        and entry.keys() == {"step", "metrics", "error", "weights", "parts"}
        and (entry["step"] is None or type(entry["step"]) is int)
        and (entry["error"] is None or type(entry["error"]) is str)
        and numbers(entry["metrics"])
        and numbers(entry["weights"])
        and isinstance(entry["parts"], dict)
    )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not leaf.is_deleted() and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, np.ndarray)
