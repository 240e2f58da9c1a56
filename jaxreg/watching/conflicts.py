"""Which terms pull against each other, over time: a strip of cosines a pair, and how often it conflicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxreg.core.spec import BASE
from jaxreg.watching.run import Run
from jaxreg.watching.summary import ending, last, mean
from jaxreg.watching.tables import section, table
from jaxreg.watching.words import called, escaped, number, percent

PREFIX = "cosine/"
CELLS = 48  # of a strip
MOST = 30  # pairs; the rest is counted
HEADS = ("pair", "cosine over the run", "last", "mean of last 10 %", "least", "conflict in")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two terms over a run.

    Attributes:
      first, second: their names.
      cosines: [S], NaN where there is none.
      conflicts: the part of the steps with a cosine in which it is below 0.
    """

    first: str
    second: str
    cosines: np.ndarray
    conflicts: float


def pairs(run: Run) -> list[Pair]:
    """Every pair of a run that has a cosine, those that conflict most first."""
    names = [BASE, *run.terms]
    found = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            key = f"{PREFIX}{first}/{second}"
            if not run.has(key):
                continue
            values = run.series(key)
            known = values[np.isfinite(values)]
            found.append(Pair(first, second, values, float(np.mean(known < 0))))
    return sorted(found, key=lambda pair: (-pair.conflicts, mean(pair.cosines)))


def conflicts(runs: Sequence[Run]) -> list[str]:
    """A section a run that has cosines."""
    return [_section(run, found, len(runs) > 1) for run in runs if (found := pairs(run))]


def _section(run: Run, found: Sequence[Pair], several: bool) -> str:
    rows = [
        [
            f"{escaped(called(pair.first))} · {escaped(called(pair.second))}",
            strip(pair.cosines),
            *map(number, (last(pair.cosines), mean(ending(pair.cosines)), float(np.nanmin(pair.cosines)))),
            percent(pair.conflicts),
        ]
        for pair in found[:MOST]
    ]
    says = (
        "The cosine of the angle between the terms' weighted gradients, from the first step to the last: red "
    )
    says += "where they pull against each other, blue where they pull together."
    if left := len(found) - MOST:
        says += f" {left:,} more pairs that conflict less often are left out." if left > 0 else ""
    heading = "Which terms pull against each other" + (f": {escaped(run.name)}" if several else "")
    return section(heading, says, table(HEADS, rows))


def strip(cosines: np.ndarray) -> str:
    """A heat map of one row, as SVG: a cell is the mean over its part of the steps.

    Example:
      >>> strip(np.array([-1.0, 1.0])).count("<rect")
      2
    """
    parts = np.array_split(cosines, min(CELLS, len(cosines)))
    cells = []
    for i, part in enumerate(parts):
        value = mean(part)
        if not np.isfinite(value):
            continue
        colour = "#c0392b" if value < 0 else "#2e6fba"
        cells.append(
            f'<rect x="{i}" y="0" width="1.03" height="1" fill="{colour}" fill-opacity="{abs(value):.2f}"/>'
        )
    ends = f"from {number(mean(parts[0]))} to {number(mean(parts[-1]))}"
    return (
        f'<svg class="heat" viewBox="0 0 {len(parts)} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{ends}"><title>{ends}</title>{"".join(cells)}</svg>'
    )
