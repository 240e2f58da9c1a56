"""A legend below a picture: as many columns as fit, as many rows as it takes, and notes under it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from jaxreg.watching.names import shortened
from jaxreg.watching.words import shown

ROW, SIGN, GAP = 0.19, 0.34, 0.22  # inches: a row's height, a line's sample, between columns
SIZE, SMALL = 9, 8  # points
LONGEST = 34  # characters of a name
NOTE_LINE = 0.155

Sample = Callable[[Any, float, float, float], None]  # draws into a figure, from x0 to x1 at y, in inches


@dataclasses.dataclass(frozen=True)
class Entry:
    """A name, and what draws the sample in front of it."""

    label: str
    sample: Sample


class Legend:
    """The entries and notes, laid out for a figure of this width.

    Attributes:
      height: inches that it takes.
    """

    def __init__(
        self, entries: Sequence[Entry], notes: Sequence[str], width: float, measure: Callable[[str], float]
    ) -> None:
        names = shortened([shown(entry.label, 200) for entry in entries], LONGEST)
        self._entries = list(zip(entries, names, strict=True))
        widest = max((measure(name) for name in names), default=0.0)
        self._column = SIGN + 0.08 + widest + GAP
        columns = max(1, min(len(names), int((width - 0.3 + GAP) / self._column)))
        self._rows = -(-len(names) // columns) if names else 0
        columns = -(-len(names) // self._rows) if names else 1
        self._left = max(0.15, (width - columns * self._column + GAP) / 2)
        characters = int(width * 14.5)
        self._notes = [
            line for note in notes for line in textwrap.wrap(shown(sentence(note), 400), characters)
        ]
        self.height = self._rows * ROW + len(self._notes) * NOTE_LINE + 0.12 * bool(names or self._notes)

    def draw(self, figure: Any, text: Callable[..., Any]) -> None:
        """Draw it at the foot of the figure; ``text`` writes, from x and y in inches."""
        foot = 0.1 + len(self._notes) * NOTE_LINE
        for i, (entry, name) in enumerate(self._entries):
            x = self._left + (i // self._rows) * self._column
            y = foot + (self._rows - 1 - i % self._rows) * ROW + ROW / 2
            entry.sample(figure, x, x + SIGN, y)
            text(x + SIGN + 0.08, y, name, SIZE)
        for i, line in enumerate(self._notes):
            text(0.15, foot - 0.05 - (i + 0.5) * NOTE_LINE, line, SMALL)


def sentence(note: str) -> str:
    """With a capital letter in front.

    Example:
      >>> sentence("equal: a, b.")
      'Equal: a, b.'
    """
    return note[:1].upper() + note[1:]
