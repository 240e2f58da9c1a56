"""Lines, areas and marks on matplotlib's axes, and their samples for a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreg.watching.charts import Line, marks
from jaxreg.watching.curves import thin
from jaxreg.watching.legend import Sample
from jaxreg.watching.run import Run
from jaxreg.watching.style import DASHES, HATCHES, LIGHT, OTHERS, Style

SIGNS = {"error": "v", "warning": "v", "nonfinite": "x"}
STROKE = 6.0  # of equal lines, in line widths


def draw_line(axes: Any, line: Line, logarithmic: bool, small: bool) -> None:
    """A mean with its range around it; points that stand alone as dots."""
    values = np.where(line.y > 0, line.y, np.nan) if logarithmic else line.y  # a logarithm has no 0
    curve = thin(line.x, values)
    if not np.isfinite(curve.mean).any():
        return
    look = Style.of(line.index, LIGHT)
    wide = (2.0 if line.index < 0 else 1.5) * (0.8 if small else 1)
    axes.plot(
        curve.x, curve.mean, color=look.color, ls=pattern(look.dash, line.turn), lw=wide, dash_capstyle="butt"
    )
    alone = curve.alone
    if alone.any():
        axes.plot(curve.x[alone], curve.mean[alone], "o", color=look.color, ms=3.5)
    if np.any(curve.high > curve.low):
        axes.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.16, lw=0)


def draw_areas(axes: Any, lines: Sequence[Line]) -> None:
    """Areas on one another."""
    if not lines:
        return
    layers = [thin(line.x, line.y) for line in lines]
    x = layers[0].x
    known = np.isfinite([layer.mean for layer in layers]).any(axis=0)
    bottom = np.where(known, 0.0, np.nan)
    if len(x) == 1:  # an area needs two ends
        x, bottom = x[0] + np.array([-0.5, 0.5]), np.repeat(bottom, 2)
    for line, layer in zip(lines, layers, strict=True):
        top = bottom + np.nan_to_num(layer.mean)
        axes.fill_between(x, bottom, top, **area_look(line.index))
        bottom = top


def draw_marks(axes: Any, run: Run) -> None:
    """Above the panel, where something happened."""
    low, high = axes.get_xlim()
    across = axes.get_xaxis_transform()
    for level, steps in marks(run).items():
        # Marks in the same place are one: a run may have thousands.
        places = list({round((step - low) / (high - low) * 200): step for step in steps}.values())
        look = {"color": LIGHT.marks[level], "transform": across}
        height = 1.02 if level == "nonfinite" else 1.045
        axes.plot(places, [height] * len(places), SIGNS[level], ms=5, clip_on=False, ls="", **look)
        if len(places) <= 12:
            axes.vlines(places, 0, 1, lw=0.8, alpha=0.5, zorder=0.5, **look)


def line_sample(index: int) -> Sample:
    """That of a line with this look."""
    look = Style.of(index, LIGHT)

    def draw(figure: Any, x0: float, x1: float, y: float) -> None:
        wide = 2.0 if index < 0 else 1.6
        _add(figure, [x0, x1], [y, y], color=look.color, ls=pattern(look.dash), lw=wide, dash_capstyle="butt")

    return draw


def area_sample(index: int) -> Sample:
    """That of an area."""

    def draw(figure: Any, x0: float, x1: float, y: float) -> None:
        from matplotlib.patches import Rectangle

        place = {"transform": figure.dpi_scale_trans}
        figure.add_artist(Rectangle((x0, y - 0.05), x1 - x0, 0.1, **area_look(index), **place))

    return draw


def mark_sample(level: str) -> Sample:
    """That of what happened."""

    def draw(figure: Any, x0: float, x1: float, y: float) -> None:
        _add(figure, [(x0 + x1) / 2], [y], color=LIGHT.marks[level], marker=SIGNS[level], ms=5, ls="")

    return draw


def _add(figure: Any, x: list[float], y: list[float], **look: Any) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D(x, y, transform=figure.dpi_scale_trans, **look))


def pattern(dash: int, turn: tuple[int, int] = (0, 1)) -> Any:
    """Matplotlib's line style. Of equal lines each draws its stroke and leaves room for the others'."""
    place, of = turn
    if of > 1:
        return (-STROKE * place, (STROKE, STROKE * (of - 1)))
    return (0, DASHES[dash]) if DASHES[dash] else "solid"


def area_look(index: int) -> dict[str, Any]:
    """Its colour, and a hatch in that of the paper."""
    look = Style.of(index, LIGHT)
    hatch = None if index == OTHERS else HATCHES[look.dash % len(HATCHES)]
    return {"facecolor": look.color, "edgecolor": LIGHT.paper, "hatch": hatch, "lw": 0.4, "alpha": 0.85}
