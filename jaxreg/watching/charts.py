"""What a chart shows, before anything draws it: lines in panels, a scale, and what has to be said below.

The pictures (matplotlib) and the charts that one can point at (a browser) are drawn from the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxreg.watching.names import shortened
from jaxreg.watching.run import Run
from jaxreg.watching.scales import Choice, Scale, bounded, symmetric

MARKS = {"error": "exception", "warning": "warning", "nonfinite": "not finite"}


@dataclasses.dataclass(frozen=True)
class Line:
    """A named curve.

    Attributes:
      label: what the legend calls it.
      x: [S] steps.
      y: [S] numbers, NaN where there is none.
      index: its look; see `jaxreg.watching.style`.
      turn: which of how many equal lines it is. They are drawn in turns, a stroke of each, so that all
        are seen.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    index: int
    turn: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines with common axes, and the runs whose exceptions and warnings are marked above them."""

    title: str
    lines: tuple[Line, ...]
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
      name: its file's, without the ending.
      heading: above it.
      says: what it shows, in a sentence or two.
      unit: of its heights.
      scale: of its heights; of each panel's own where they are small.
      panels: one, or one a run with the same axes, or many small ones.
      small: whether each panel has axes of its own.
      notes: what cannot be seen.
      choose: what gives each small panel its scale.
    """

    name: str
    heading: str
    says: str
    unit: str
    scale: Scale
    panels: tuple[Panel, ...]
    small: bool = False
    notes: tuple[str, ...] = ()
    choose: Choice = symmetric


def lines_chart(
    name: str, heading: str, says: str, unit: str, choose: Choice, panels: Sequence[Panel]
) -> Chart | None:
    """A chart of lines whose panels share their axes; None where there is no number."""
    panels = [dataclasses.replace(panel, lines=shown(panel.lines)) for panel in panels]
    lines = [line for panel in panels for line in panel.lines]
    if not lines:
        return None
    scale = choose([line.y for line in lines])
    panels = [dataclasses.replace(panel, lines=with_turns(panel.lines, scale)) for panel in panels]
    many = len(panels) > 1
    notes = [note for panel in panels for note in notes_of(panel, scale, panel.title if many else "")]
    return Chart(name, heading, says, unit, scale, tuple(panels), notes=tuple(dict.fromkeys(notes)))


def panel_scale(chart: Chart, panel: Panel) -> Scale:
    """That of the chart, or of a small panel its own."""
    return chart.choose([line.y for line in panel.lines]) if chart.small else chart.scale


def shown(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Those with a number in them, as far as axes can show them."""
    there = (line for line in lines if np.isfinite(line.y).any())
    return tuple(dataclasses.replace(line, y=bounded(line.y)) for line in there)


def with_turns(lines: Sequence[Line], scale: Scale) -> tuple[Line, ...]:
    """The lines; where some are equal in half of their steps or more, each knows its turn.

    Example:
      >>> x, y = np.arange(3), np.ones(3)
      >>> lines = [Line("a", x, y, 0), Line("b", x, 2 * y, 1), Line("c", x, y, 2)]
      >>> [line.turn for line in with_turns(lines, Scale())]
      [(0, 2), (0, 1), (1, 2)]
    """
    turns = {i: (turn, len(group)) for group in _alike(lines, scale) for turn, i in enumerate(group)}
    return tuple(dataclasses.replace(line, turn=turns[i]) for i, line in enumerate(lines))


def _alike(lines: Sequence[Line], scale: Scale) -> list[list[int]]:
    """The lines' places, those of lines that hide one another together."""
    groups: list[list[int]] = []
    seen = [np.where(line.y > 0, line.y, np.nan) if scale.kind == "log" else line.y for line in lines]
    for i, line in enumerate(lines):
        for group in groups:
            first = group[0]
            same_steps = line.x is lines[first].x or np.array_equal(line.x, lines[first].x)
            if same_steps and _equal(seen[first], seen[i]):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether in half of their numbers or more."""
    return 2 * int((a == b).sum()) >= max(np.isfinite(a).sum(), np.isfinite(b).sum(), 1)


def notes_of(panel: Panel, scale: Scale, where: str = "") -> list[str]:
    """What the panel's lines hide: others that are equal, and zeros where the scale has none."""
    place = f"{where}: " if where else ""
    labels = shortened([line.label for line in panel.lines])
    alike = [[labels[i] for i in group] for group in _alike(panel.lines, scale) if len(group) > 1]
    notes = [f"{place}equal, and drawn in turns: {listed(names)}." for names in alike]
    if scale.kind != "log":
        return notes
    counts = [(int((line.y == 0).sum()), int(np.isfinite(line.y).sum())) for line in panel.lines]
    zeros = [(label, *count) for label, count in zip(labels, counts, strict=True)]
    always = [name for name, count, steps in zeros if count == steps]
    if always:
        notes.append(f"{place}exactly 0 throughout, for which this scale has no place: {listed(always)}.")
    some = [f"{name} (in {count:,} of {steps:,})" for name, count, steps in zeros if 0 < count < steps]
    if some:
        notes.append(f"{place}exactly 0 in some steps, where the line is broken: {listed(some)}.")
    return notes


def listed(names: Sequence[str], most: int = 12) -> str:
    """The names, or the first of them and how many more there are.

    Example:
      >>> listed(["a", "b"]), listed(["a", "b", "c", "d"], 2)
      ('a, b', 'a, b and 2 more')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def marks(run: Run) -> dict[str, list[int]]:
    """The steps at which something happened: exceptions, warnings, numbers that are not finite."""
    first, last = run.steps[0], run.steps[-1]
    at: dict[str, list[int]] = {
        level: [
            note.step
            for note in run.notes
            if note.level == level and note.step is not None and first <= note.step <= last
        ]
        for level in ("error", "warning")
    }
    at["nonfinite"] = run.steps[run.nonfinite()].tolist()
    return {level: sorted(set(steps)) for level, steps in at.items() if steps}
