"""A run in numbers: what a report's tables say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxreg.core.spec import BASE, TOTAL
from jaxreg.watching.run import Run

END = 0.1  # the part of a run that counts as its end
AT_LAST = ("weight", "value", "grad_norm", "grad_norm_weighted")


@dataclasses.dataclass(frozen=True)
class Facts:
    """A term over a run; NaN where there is no number.

    Attributes:
      last: its contribution in the last step that has it.
      end: the mean of its contribution over the last tenth of the run.
      least: of its contribution.
      greatest: of its contribution.
      weight: in the last step that has it.
      value: of the term itself, in the last step that has it.
      norm: of its value's gradient, in the last step that has it.
      weighted_norm: of its contribution's gradient; of the total, of the sum of all.
      share: of the gradient, the mean over the last tenth; see `Run.share`.
      nonfinite: steps in which it had a number that was not finite.
      steps: how many have the term.
    """

    name: str
    last: float
    end: float
    least: float
    greatest: float
    weight: float
    value: float
    norm: float
    weighted_norm: float
    share: float
    nonfinite: int
    steps: int


def summary(run: Run) -> list[Facts]:
    """The base loss, every term and the total.

    Example:
      >>> from jaxreg.watching.records import parse
      >>> run = Run()
      >>> for value in (3, 1):
      ...     run.add(parse(b'{"loss_total": %d, "base_loss": {"value": 1}, "regularizers": {}}' % value))
      >>> [(facts.name, facts.last, facts.greatest) for facts in summary(run)]
      [('base_loss', 1.0, 1.0), ('loss_total', 1.0, 3.0)]
    """
    shares = run.shares()
    facts = [_of(run, name, run.of(name, "contribution"), shares[name]) for name in (BASE, *run.terms)]
    total = _of(run, TOTAL, _series(run, "loss/total"), _none(run))
    return [*facts, dataclasses.replace(total, weighted_norm=last(_series(run, "grad_norm/total")))]


def _of(run: Run, name: str, values: np.ndarray, share: np.ndarray) -> Facts:
    term = name != TOTAL
    known = values[np.isfinite(values)]
    at_last = {key: last(run.of(name, key)) if term else math.nan for key in AT_LAST}
    return Facts(
        name=name,
        last=last(values),
        end=mean(ending(values)),
        least=float(known.min()) if len(known) else math.nan,
        greatest=float(known.max()) if len(known) else math.nan,
        weight=at_last["weight"],
        value=at_last["value"],
        norm=at_last["grad_norm"],
        weighted_norm=at_last["grad_norm_weighted"],
        share=mean(ending(share)),
        nonfinite=int((run.nonfinite(name) if term else run.nonfinite()).sum()),
        steps=int(run.present(name).sum()) if term else len(run.steps),
    )


def meeting(first: Run, other: Run) -> tuple[int, int] | None:
    """The last tenth of the steps that both runs have been through: its first and its last step, or None
    where one begins after the other's end.

    Example:
      >>> from jaxreg.watching.records import record
      >>> runs = [Run(), Run()]
      >>> for run, steps in zip(runs, (100, 41)):
      ...     for step in range(steps):
      ...         run.add(record({"step": step, "loss_total": 1.0, "base_loss": {}, "regularizers": {}}))
      >>> meeting(*runs)
      (37, 40)
    """
    begin, end = max(first.steps[0], other.steps[0]), min(first.steps[-1], other.steps[-1])
    if begin > end:
        return None
    return int(end - max(0, round(END * (end - begin + 1)) - 1)), int(end)


class Ends:
    """A run's means over some steps, or over its own last tenth.

    Args:
      run: the run.
      window: the first and the last of the steps. A run that logs rarely and has none of them is taken at
        the last that it has before their end.
    """

    def __init__(self, run: Run, window: tuple[int, int] | None) -> None:
        low, high = window or (ending(run.steps)[0], run.steps[-1])
        stop = int(np.searchsorted(run.steps, high, "right"))
        start = int(np.searchsorted(run.steps, low))
        self._run, self._shares = run, run.shares()
        self._rows = slice(min(start, max(stop - 1, 0)), max(stop, 1))

    def contribution(self, name: str) -> float:
        """Of a term, or of the total."""
        values = _series(self._run, "loss/total") if name == TOTAL else self._run.of(name, "contribution")
        return mean(values[self._rows])

    def share(self, name: str) -> float:
        """A term's share of the gradient."""
        return mean(self._shares[name][self._rows]) if name in self._shares else math.nan


def ending(values: np.ndarray) -> np.ndarray:
    """The last tenth, at least one."""
    return values[-max(1, round(END * len(values))) :]


def mean(values: np.ndarray) -> float:
    """Of what is a number; NaN where nothing is.

    Example:
      >>> mean(np.array([1.0, np.nan, 2.0]))
      1.5
    """
    known = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        return float(known.mean()) if len(known) else math.nan


def last(values: np.ndarray) -> float:
    """The last that is a number; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _series(run: Run, name: str) -> np.ndarray:
    return run.series(name) if name in run.names else _none(run)


def _none(run: Run) -> np.ndarray:
    return np.full(len(run.steps), np.nan)
