"""What a live table shows: the last step, a little of the past, and the notes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from jaxreg.core.spec import BASE
from jaxreg.watching.records import NAN, Item, Note, Record

PAST = 160  # steps that the trend and the speed look back on
NOTES = 3  # notes that are shown; the rest is counted


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One term as the table shows it; NaN where there is no number.

    Attributes:
      share: of the gradient, from 0 to 1; see `Run.share`.
      trend: its contribution over the recent steps.
      host: what a host term took and how old its value is, or ``""``.
      broken: whether it had a number that was not finite in this step.
    """

    name: str
    value: float
    weight: float
    contribution: float
    norm: float
    share: float
    trend: tuple[float, ...]
    host: str
    broken: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Against:
    """Two terms whose weighted gradients pull against each other.

    Attributes:
      first, second: their names.
      cosine: of the last step, below 0.
      trend: over the recent steps, NaN where there is none.
    """

    first: str
    second: str
    cosine: float
    trend: tuple[float, ...]


class Board:
    """Takes records and notes as they come; holds no more than a table needs.

    Attributes:
      compiling: the program that XLA compiles just now, and when that began (seconds since 1970), or None.

    Example:
      >>> from jaxreg.watching.records import parse
      >>> board = Board()
      >>> board.take(parse(b'{"step": 4, "loss_total": 2, "base_loss": {"value": 2}, "regularizers": {}}'))
      >>> [row.name for row in board.rows()], board.step
      (['base_loss'], 4)
    """

    def __init__(self) -> None:
        self.count = 0
        self.counts: collections.Counter[str] = collections.Counter()  # of the notes, by level
        self.notes: collections.deque[Note] = collections.deque(maxlen=NOTES)
        self.compiling: tuple[str, float] | None = None
        self.nonfinite = 0  # steps with a number that was not finite
        self._past: collections.deque[Record] = collections.deque(maxlen=PAST)

    def take(self, item: Item) -> None:
        """The next record or note."""
        if isinstance(item, Note):
            if item.event == "compile.start":
                self.compiling = str(item.details.get("program") or "a program"), item.time
                return
            if item.event == "compile":
                self.compiling = None
            self.counts[item.level] += 1
            if item.level != "compile":
                self.notes.append(item)
            return
        self.compiling = None
        step = item.step
        if step is None:
            item = dataclasses.replace(item, step=0 if self.step is None else self.step + 1)
        elif self.step is not None and step <= self.step:  # the run went on from an older checkpoint
            kept = [r for r in self._past if r.step is not None and r.step < step]
            self._past = collections.deque(kept, PAST)
        self._past.append(item)
        self.count += 1
        self.nonfinite += bool(item.nonfinite)

    @property
    def last(self) -> Record | None:
        """The last step's record."""
        return self._past[-1] if self._past else None

    @property
    def step(self) -> int | None:
        """The last step's number."""
        return self._past[-1].step if self._past else None

    @property
    def pace(self) -> float:
        """Steps a second over the recent past, or NaN."""
        timed = [(r.step, r.values["time"]) for r in self._past if "time" in r.values]
        if len(timed) < 2 or timed[0][0] is None or timed[-1][0] is None:
            return NAN
        steps, seconds = timed[-1][0] - timed[0][0], timed[-1][1] - timed[0][1]
        return steps / seconds if seconds > 0 else NAN

    def rows(self) -> list[Row]:
        """The base loss and the terms of the last step, in order."""
        if (last := self.last) is None:
            return []
        names = (BASE, *last.terms)
        norms = {name: abs(_of(last, name, "grad_norm_weighted")) for name in names}
        known = [norm for norm in norms.values() if not math.isnan(norm)]
        whole = sum(known) if not any(math.isnan(norms.get(name, 0)) for name in last.nonfinite) else NAN
        return [self._row(last, name, norms[name], whole) for name in names]

    def _row(self, last: Record, name: str, norm: float, whole: float) -> Row:
        return Row(
            name=name,
            value=_of(last, name, "value"),
            weight=_of(last, name, "weight"),
            contribution=_of(last, name, "contribution"),
            norm=norm,
            share=norm / whole if whole > 0 else NAN,
            trend=tuple(_of(record, name, "contribution") for record in self._past),
            host=_host(last, name),
            broken=name in last.nonfinite,
        )

    def against(self) -> list[Against]:
        """The pairs whose cosine was below 0 in the last step, the least first."""
        if (last := self.last) is None:
            return []
        found = []
        for first, second in itertools.combinations((BASE, *last.terms), 2):
            key = f"cosine/{first}/{second}"
            if (cosine := last.values.get(key, NAN)) < 0:
                trend = tuple(record.values.get(key, NAN) for record in self._past)
                found.append(Against(first, second, cosine, trend))
        return sorted(found, key=lambda pair: pair.cosine)

    def total(self, name: str) -> float:
        """A number of the last step by flat name, or NaN."""
        return self.last.values.get(name, NAN) if self.last else NAN

    def total_trend(self) -> tuple[float, ...]:
        """The total loss over the recent steps."""
        return tuple(record.values.get("loss/total", NAN) for record in self._past)


def _of(record: Record, name: str, key: str) -> float:
    if name != BASE:
        return record.values.get(f"reg/{name}/{key}", NAN)
    if key == "weight":
        return 1.0
    return record.values.get("loss/base" if key in ("value", "contribution") else "grad_norm/base", NAN)


def _host(record: Record, name: str) -> str:
    """Of a term that runs outside XLA: its seconds, its age, whether it trains."""
    seconds, age, trains = (
        record.values.get(f"reg/{name}/{key}", NAN) for key in ("host_seconds", "host_age", "host_trains")
    )
    said = []
    if age == -1:
        said.append("skipped")
    elif not math.isnan(seconds):
        said.append(f"{seconds:.2g} s")
    if age > 0:
        said.append(f"{age:.0f} old")
    if trains == 0:
        said.append("no grad")
    return ", ".join(said)


def buckets(values: Sequence[float], n: int) -> list[float]:
    """The means of at most ``n`` runs of neighbours, without NaN where there is any number.

    Example:
      >>> buckets([1.0, 3.0, 5.0, 7.0], 2), buckets([1.0, 2.0], 9)
      ([2.0, 6.0], [1.0, 2.0])
    """
    if len(values) <= n:
        return list(values)
    result = []
    for i in range(n):
        own = values[i * len(values) // n : (i + 1) * len(values) // n]
        numbers = [v for v in own if not math.isnan(v)]
        result.append(sum(numbers) / len(numbers) if numbers else NAN)
    return result
