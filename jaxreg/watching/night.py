"""A picture's colours by night: the same picture, with another palette.

Every colour of a picture is the paper's, a theme's, or on the way from the one to the other, where an edge
is smoothed or an area is half transparent. By night it is as far on the way from that theme's paper to the
same ink. This costs nothing, where drawing twice doubles the time; where lines of two colours lie over one
another, it is the nearer one's.
"""

from __future__ import annotations

import numpy as np

from jaxreg.watching.style import Theme

NEARLY = 0.03  # of the way: as good as paper


def repainted(palette: np.ndarray, day: Theme, night: Theme) -> np.ndarray:
    """A palette of day's colours, uint8 [N, 3], in night's.

    Example:
      >>> from jaxreg.watching.style import DARK, LIGHT
      >>> repainted(np.array([rgb(LIGHT.paper), rgb(LIGHT.terms[0])], np.uint8), LIGHT, DARK).tolist()
      [[22, 27, 34], [60, 155, 232]]
    """
    papers = [np.array(rgb(theme.paper), float) for theme in (day, night)]
    inks = [np.array([rgb(color) for color in inks_of(theme)], float) for theme in (day, night)]
    ways = inks[0] - papers[0]  # [K, 3]
    offsets = palette.astype(float) - papers[0]  # [N, 3]
    parts = np.clip(offsets @ ways.T / (ways**2).sum(axis=1), 0, 1)  # [N, K] how far on each way
    nearest = ((offsets[:, None] - parts[:, :, None] * ways) ** 2).sum(axis=2).argmin(axis=1)
    part = parts[np.arange(len(palette)), nearest]
    part = np.where(part < NEARLY, 0.0, part)[:, None]
    return np.rint(papers[1] + part * (inks[1][nearest] - papers[1])).astype(np.uint8)


def inks_of(theme: Theme) -> list[str]:
    """All colours but the paper's."""
    return [theme.ink, theme.base, theme.total, *theme.terms, *theme.marks.values()]


def rgb(color: str) -> tuple[int, int, int]:
    """The parts of "#rrggbb", from 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
