"""What a line of a run's file means: a step's record or a note.

A run's file is JSONL: one object a line, ``step`` first. A line without the key ``event`` is a step's
record: ``to_dict()`` of its output, and optionally ``time``, ``metrics`` and ``timings``. A line with it is
a note: a warning, an exception, a compile. A process that was killed leaves a torn last line, a full disk
worse; so a line that is neither is refused here with a `ValueError`, and counted by who reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from jaxreg.core.spec import BASE, RESERVED_METRICS

HUGE = 16 * 2**20  # bytes; a longer line is no record, and is never held in memory
LARGEST_STEP = 2**53  # beyond it, steps are no longer exact as floats
LONGEST_TEXT = 4000
NAN = math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One step.

    Attributes:
      step: its number; None where it was logged without one.
      values: numbers by flat name, as in ``to_flat_dict()``; NaN where not finite or not tracked.
      terms: the names of its regularizers, in order.
      nonfinite: the names of the terms with a number that is not finite.
    """

    step: int | None
    values: dict[str, float]
    terms: tuple[str, ...]
    nonfinite: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """Something besides the steps: a warning, an exception, a compile.

    Attributes:
      event: the event's name, such as ``"warning"``.
      step: the step at which it happened, or None.
      time: seconds since 1970, or NaN.
      details: the rest of its line.

    Example:
      >>> note = Note("warning", 7, 0.0, {"kind": "spike", "term": "kl", "message": "12 x its median"})
      >>> note.text
      'kl: 12 x its median'
      >>> note.level
      'warning'
    """

    event: str
    step: int | None
    time: float
    details: Mapping[str, Any]

    @property
    def level(self) -> str:
        """``"error"``, ``"compile"`` or ``"warning"``, which anything else is, too."""
        if self.event.endswith("exception"):
            return "error"
        return "compile" if self.event == "compile" else "warning"

    @property
    def text(self) -> str:
        """What happened, on one line."""
        said = self._first("message", "error") or self._first("kind") or self.event
        if self.level == "compile":
            seconds = self.details.get("seconds")
            took = f" in {seconds:.2g} s" if isinstance(seconds, float) else ""
            changed = self._first("changed")
            said = f"{self._first('program') or 'a program'}{took}" + (f" ({changed})" if changed else "")
        where = self._first("term") or ("the server" if self.event.startswith("server") else "")
        said = said.rpartition(f"host term {where!r}: ")[2]  # said once is enough where there is little room
        return f"{where}: {said}" if where and where not in said else said

    def _first(self, *keys: str) -> str:
        for key in keys:
            if (value := self.details.get(key)) not in (None, "", [], {}):
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                return " ".join(text[:LONGEST_TEXT].split())
        return ""


Item: TypeAlias = Record | Note


def parse(line: bytes) -> Item:
    """One line's record or note.

    Example:
      >>> parse(b'{"step": 3, "event": "compile", "program": "train_step", "seconds": 1.5}').text
      'train_step in 1.5 s'

    Raises:
      ValueError: it is neither.
    """
    try:
        data = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"an object is expected, not {type(data).__name__}")
    return note(data) if "event" in data else record(data)


def note(data: Mapping[str, Any]) -> Note:
    """A note from a line's object."""
    if not isinstance(data["event"], str):
        raise ValueError("event is not a string")
    details = {k: v for k, v in data.items() if k not in ("event", "step", "time")}
    return Note(data["event"], _step(data.get("step")), _number(data.get("time")), details)


def record(data: Mapping[str, Any]) -> Record:
    """A step's record from a line's object.

    Example:
      >>> record({"step": 0, "loss_total": 2.0, "base_loss": {"value": 2.0}, "regularizers": {}}).values
      {'loss/total': 2.0, 'loss/base': 2.0}
    """
    base = data.get("base_loss", {})
    terms = data.get("regularizers", {})
    if "loss_total" not in data or not isinstance(base, dict) or not isinstance(terms, dict):
        raise ValueError("no record of a step")
    values: dict[str, float] = {}
    for prefix, key in (("", "metrics"), ("timings/", "timings")):
        values |= _numbers(data.get(key), prefix)
    values |= _numbers(base.get("custom"), "loss/base/")
    values["loss/total"], values["loss/base"] = _number(data["loss_total"]), _number(base.get("value"))
    flat = (
        ("time", data.get("time")),
        ("loss/regularizer_total", data.get("regularizer_total")),
        ("grad_norm/total", data.get("total_grad_norm")),
        ("grad_norm/base", base.get("grad_norm")),
    )
    values |= {name: _number(value) for name, value in flat if value is not None}
    for name, term in terms.items():
        if not isinstance(term, dict):
            raise ValueError("a term is not an object")
        values |= _numbers(term.get("custom"), f"reg/{name}/")
        for key in RESERVED_METRICS:
            if (value := term.get(key)) is not None:
                values[f"reg/{name}/{key}"] = _number(value)
    values |= _of_pairs(data)
    return Record(_step(data.get("step")), values, tuple(terms), _nonfinite(data, base, terms))


def _of_pairs(data: Mapping[str, Any]) -> dict[str, float]:
    """What a step has with a Gramian, with norms now and then, and with an aggregator."""
    cosines, aggregation = data.get("cosines") or {}, data.get("aggregation") or {}
    if not isinstance(cosines, dict) or not isinstance(aggregation, dict):
        raise ValueError("cosines or aggregation is not an object")
    values: dict[str, float] = {}
    for first, others in cosines.items():
        values |= _numbers(others, f"cosine/{first}/")
    if (age := data.get("norms_age")) is not None:
        values["norms/age"] = _number(age)
    values |= _numbers(aggregation.get("coefficients"), "aggregation/coefficient/")
    return values | _numbers(aggregation.get("metrics"), "aggregation/")


def _nonfinite(data: Mapping[str, Any], base: Mapping[str, Any], terms: Mapping[str, Any]) -> tuple[str, ...]:
    listed = data.get("nonfinite") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError("nonfinite is not a list of names")
    # A writer in another language may not list them; but a value is always a number, or not finite.
    missing = [name for name, term in terms.items() if not _finite(term.get("value"))]
    if "value" in base and not _finite(base["value"]):
        missing.append(BASE)
    return tuple(dict.fromkeys((*listed, *missing)))


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(_number(value))


def _numbers(data: Any, prefix: str) -> dict[str, float]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{prefix} is not an object")
    return {prefix + name: _number(value) for name, value in data.items()}


def _number(value: Any) -> float:
    """A float, NaN for what is not finite: a plot and a table show both alike."""
    if type(value) is float:
        return value if math.isfinite(value) else NAN
    if value is None:
        return NAN
    if not isinstance(value, int | float):
        raise ValueError(f"a number is expected, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number too large for a float") from None


def _step(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("step is not a number")
    if not abs(value) <= LARGEST_STEP or value != int(value):
        raise ValueError("step is not a whole number")
    return int(value)


class Lines:
    """Bytes in any portions to whole lines.

    Attributes:
      skipped: how many lines were too long to be one.

    Example:
      >>> lines = Lines()
      >>> list(lines.feed(b"one\\ntw")), list(lines.feed(b"o\\n")), list(lines.rest())
      ([b'one'], [b'two'], [])
    """

    def __init__(self, huge: int = HUGE) -> None:
        self.skipped = 0
        self._huge, self._begun, self._dropping = huge, b"", False

    def feed(self, portion: bytes) -> Iterator[bytes]:
        """The lines that end in this portion, without those that are blank."""
        *whole, begun = portion.split(b"\n")
        for line in whole:
            if len(self._begun) + len(line) > self._huge:
                self._dropping = True
            if self._dropping:
                self.skipped += 1
            elif joined := (self._begun + line).strip():
                yield joined
            self._begun, self._dropping = b"", False
        if len(self._begun) + len(begun) > self._huge:
            self._begun, self._dropping = b"", True
        elif not self._dropping:
            self._begun += begun

    def rest(self) -> Iterator[bytes]:
        """The line that has begun and not ended, if there is one: the file grows no more."""
        yield from self.feed(b"\n")
