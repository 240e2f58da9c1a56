"""A small table as HTML, for notebooks: escaped, without colours of its own, so at home in light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence

_RULE = "border-bottom:1px solid currentColor;"


def table(title: str, rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """A title and rows of cells, of which the first is the head; numbers stand to the right.

    Args:
      title: stands above.
      rows: cells of plain text.
      left: which columns are text.

    Example:
      >>> "<b>" in table("a & b", [["name"], ["<b>"]])
      False
    """
    head, *body = [_row(row, left, first=i == 0) for i, row in enumerate(rows)]
    return (
        f'<table style="border-collapse:collapse;color:inherit;font-variant-numeric:tabular-nums">'
        f'<caption style="caption-side:top;text-align:left;color:inherit;white-space:nowrap">'
        f"{html.escape(title)}</caption>"
        f"<thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
    )


def line(text: str) -> str:
    """One line of plain text."""
    return f'<div style="color:inherit">{html.escape(text)}</div>'


def _row(cells: Sequence[str], left: Sequence[int], *, first: bool) -> str:
    tag, rule = ("th", _RULE) if first else ("td", "")
    return (
        "<tr>"
        + "".join(
            f'<{tag} style="{rule}background:none;padding:2px 8px;'
            f'text-align:{"left" if i in left else "right"}">{html.escape(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )
        + "</tr>"
    )
