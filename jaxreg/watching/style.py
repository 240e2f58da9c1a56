"""How terms are told apart in pictures: colours, line styles, hatches."""

from __future__ import annotations

import dataclasses

DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
HATCHES = (None, "////", "....", "xxxx")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours. Hues are told apart with the usual kinds of colour blindness, too; more than seven terms
    take the next line style.

    Attributes:
      base: of the base loss.
      terms: of the terms, in their order.
      marks: of exceptions, warnings and what is not finite.
    """

    paper: str
    ink: str
    faint: str
    base: str
    terms: tuple[str, ...]
    marks: dict[str, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#24292f",
    faint="#d8dee4",
    base="#24292f",
    terms=("#0072b2", "#d55e00", "#009e73", "#b8479b", "#a87900", "#3aa5dc", "#882233"),
    marks={"error": "#c0242b", "warning": "#b07800", "nonfinite": "#7d3cbd"},
)
DARK = Theme(
    paper="#161b22",
    ink="#d5dbe3",
    faint="#30363d",
    base="#e6edf3",
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
        """That of the term with this index; −1 is the base loss."""
        if index < 0:
            return cls(theme.base, 0)
        n = len(theme.terms)
        return cls(theme.terms[index % n], index // n % len(DASHES))
