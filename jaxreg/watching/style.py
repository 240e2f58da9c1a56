"""How terms are told apart in pictures: colours, line styles, hatches."""

from __future__ import annotations

import dataclasses

# Strokes and gaps in points; with seven colours, enough for 63 terms.
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (7, 3),
    (1.6, 2),
    (8, 2.4, 1.6, 2.4),
    (3.5, 2),
    (12, 3),
    (8, 2, 1.6, 2, 1.6, 2),
    (1.6, 5),
    (12, 2.4, 3.5, 2.4),
)
INK, OTHERS, TOTAL, REST = -1, -2, -3, -4  # the base loss, a sum of small areas, the total, all but the base
HATCHES = (None, "////", "....", "xxxx")  # of areas, of which there are fewer


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours. Hues are told apart with the usual kinds of colour blindness, too; more than seven terms
    take the next line style.

    Attributes:
      base: of the base loss.
      total: of the total.
      terms: of the terms, in their order.
      marks: of exceptions, warnings and what is not finite.
    """

    paper: str
    ink: str
    faint: str
    base: str
    total: str
    terms: tuple[str, ...]
    marks: dict[str, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#24292f",
    faint="#d8dee4",
    base="#24292f",
    total="#6a3fd0",
    terms=("#0072b2", "#d55e00", "#009e73", "#b8479b", "#a87900", "#3aa5dc", "#882233"),
    marks={"error": "#c0242b", "warning": "#b07800", "nonfinite": "#7d3cbd"},
)
DARK = Theme(
    paper="#161b22",
    ink="#d5dbe3",
    faint="#30363d",
    base="#e6edf3",
    total="#b79bff",
    terms=("#3c9be8", "#ff8a3d", "#1fc498", "#e07cc5", "#d9ab2b", "#8fd3ff", "#e0607a"),
    marks={"error": "#ff6b6b", "warning": "#e3b341", "nonfinite": "#bc8cff"},
)


@dataclasses.dataclass(frozen=True)
class Style:
    """How a term looks in every picture of a report."""

    color: str
    dash: int

    @classmethod
    def of(cls, index: int, theme: Theme) -> Style:
        """That of the term with this index, or of what has no number among the terms."""
        if index < 0:
            color = {INK: theme.base, OTHERS: theme.faint}.get(index, theme.total)
            return cls(color, int(index == REST))
        n = len(theme.terms)
        return cls(theme.terms[index % n], index // n % len(DASHES))
