"""A run in numbers: what a report's tables say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxreg.core.spec import BASE, TOTAL
from jaxreg.watching.run import Run

END = 0.1  # the part of a run that counts as its end


@dataclasses.dataclass(frozen=True)
class Facts:
    """A term over a run; NaN where there is no number.

    Attributes:
      last: its contribution in the last step that has it.
      end: the mean of its contribution over the last tenth of the run.
      least: of its contribution.
      greatest: of its contribution.
      weight: in the last step that has it.
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
    facts = [_facts(run, name) for name in (BASE, *run.terms)]
    total = _of(run, TOTAL, run.series("loss/total") if run.has("loss/total") else _none(run))
    return [*facts, dataclasses.replace(total, weight=math.nan, share=math.nan)]


def _facts(run: Run, name: str) -> Facts:
    return _of(run, name, run.of(name, "contribution"))


def _of(run: Run, name: str, values: np.ndarray) -> Facts:
    term = name != TOTAL
    known = values[np.isfinite(values)]
    return Facts(
        name=name,
        last=float(known[-1]) if len(known) else math.nan,
        end=mean(ending(values)),
        least=float(known.min()) if len(known) else math.nan,
        greatest=float(known.max()) if len(known) else math.nan,
        weight=_last(run.of(name, "weight")) if term else math.nan,
        share=mean(ending(run.share(name))) if term else math.nan,
        nonfinite=int((run.nonfinite(name) if term else run.nonfinite()).sum()),
        steps=int(run.present(name).sum()) if term else len(run.steps),
    )


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


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _none(run: Run) -> np.ndarray:
    return np.full(len(run.steps), np.nan)
