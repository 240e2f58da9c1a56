"""Names, numbers and times as people read them on a page."""

from __future__ import annotations

import datetime
import html
import math

from jaxreg.core.spec import BASE


def shown(text: str, longest: int = 60) -> str:
    """What a file calls something, on one line, without what no font has."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def escaped(text: str, longest: int = 200) -> str:
    """Text from anywhere, as HTML that shows it.

    Example:
      >>> escaped("<b>&")
      '&lt;b&gt;&amp;'
    """
    return html.escape(shown(text, longest))


def called(name: str) -> str:
    """A term's name on the page."""
    return "base loss" if name == BASE else name


def number(value: float) -> str:
    """Four digits, or a dash where there is none."""
    return "–" if not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def percent(share: float) -> str:
    """A part of a whole.

    Example:
      >>> percent(0.1234), percent(0.0001), percent(0.0), percent(math.nan)
      ('12.3 %', '<0.1 %', '0 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    if share == 0:
        return "0 %"
    return "<0.1 %" if 0 < share < 0.0005 else f"{share:.1%}".replace("%", " %").replace("-", "−")


def duration(seconds: float) -> str:
    """In words that fit the length.

    Example:
      >>> duration(4.2), duration(75), duration(90000)
      ('4.2 s', '1 min 15 s', '25 h 0 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds) // 60
    return (
        f"{minutes} min {round(seconds) % 60} s"
        if minutes < 60
        else f"{minutes // 60:,} h {minutes % 60} min"
    )


def when(seconds: float) -> str:
    """A time since 1970 as a date, UTC."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):  # no time that a calendar has
        return "–"
