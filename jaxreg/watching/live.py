"""Charts as data for a browser: numbers of every line, short enough for a page, safe inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from jaxreg.watching.charts import MARKS, Chart, Line, marks, panel_scale
from jaxreg.watching.curves import thin
from jaxreg.watching.run import Run
from jaxreg.watching.style import DASHES, INK, LIGHT, OTHERS, Style
from jaxreg.watching.summary import last
from jaxreg.watching.words import shown

MOST, LEAST = 2000, 100  # points of a line
ROOM = 1_200_000  # bytes for all lines
BYTES = 16 / 3  # of a point in base64
MOST_MARKS = 300  # of a kind


def data(charts: Sequence[Chart], room: int = ROOM) -> str:
    """The charts as JSON that can stand in a script element, in about so many bytes.

    A line of more steps than it may have points keeps the least and the greatest of every few steps, so that
    no spike is lost; an area keeps their mean. Numbers are float32, little-endian, in base64; equal lines
    stand there once.
    """
    pool = _Pool(charts, room)
    found = {
        "marks": [_marks(run) for run in pool.runs],
        "charts": [_chart(chart, pool) for chart in charts],
        "x": pool.x,
        "y": pool.y,
    }
    # A name may hold "</script>" or "<!--": nothing that ends a script may stand in it as it is.
    text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def scripts() -> tuple[str, str]:
    """The library, with its licence, and what makes the charts with it."""
    licence, library, own = map(static, ("LICENSE-uPlot", "uPlot.iife.min.js", "report.js"))
    library = library[
        library.index("*/") + 2 :
    ].strip()  # its name and address, which the licence's text replaces
    return f"/*! uPlot\n\n{licence.strip()}\n*/\n{library}", own


def static(name: str) -> str:
    """A file that goes into the page."""
    return resources.files("jaxreg.watching").joinpath("static", name).read_text(encoding="utf-8")


def digest(script: str) -> str:
    """How a content security policy names a script.

    Example:
      >>> digest("")
      "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def decimated(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The line in at most so many points: of every few steps the least and the greatest, in their order.

    Example:
      >>> decimated(np.arange(6), np.array([0.0, 9.0, 1.0, 5.0, 4.0, np.nan]), 4)
      (array([0, 1, 3, 4]), array([0., 9., 5., 4.]))
    """
    if len(x) <= points:
        return x, y
    count = points // 2
    starts = np.arange(count) * len(x) // count
    ends = np.append(starts[1:], len(x))
    at = np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)
    part, rows = y[at], np.arange(count)
    low = np.where(np.isnan(part), np.inf, part).argmin(axis=1)
    high = np.where(np.isnan(part), -np.inf, part).argmax(axis=1)
    pairs = np.stack([part[rows, np.minimum(low, high)], part[rows, np.maximum(low, high)]], axis=1)
    return np.stack([x[starts], x[(starts + ends) // 2]], axis=1).ravel(), pairs.ravel()


def averaged(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The line in at most so many points: every few steps' mean, at their first."""
    if len(x) <= points:
        return x, y
    starts = np.arange(points) * len(x) // points
    return x[starts], thin(x, y, points).mean


class _Pool:
    """The numbers of all charts, each line's once."""

    def __init__(self, charts: Sequence[Chart], room: int) -> None:
        panels = [panel for chart in charts for panel in chart.panels]
        self.runs: list[Run] = list({id(run): run for panel in panels for run in panel.runs}.values())
        lines = {_key(line) for panel in panels for line in panel.lines}
        self._points = max(LEAST, min(MOST, int(room / BYTES) // max(1, len(lines))))
        self.x: list[Any] = []
        self.y: list[Any] = []
        self._places: dict[Any, tuple[int, int]] = {}
        self._steps: dict[tuple[bytes, bool], int] = {}

    def add(self, line: Line, area: bool) -> tuple[int, int]:
        """The places of its steps and its numbers. Areas are means, which add up; lines keep their spikes."""
        if (key := (*_key(line), area)) not in self._places:
            x, y = (averaged if area else decimated)(line.x, line.y, self._points)
            known = self._steps.setdefault((x.tobytes(), area), len(self.x))
            if known == len(self.x):
                few = len(x) < len(line.x)
                self.x.append(_steps(x) | {"n": len(x), "few": few, "pairs": few and not area})
            self._places[key] = known, len(self.y)
            self.y.append(_numbers(y))
        return self._places[key]


def _key(line: Line) -> tuple[bytes, bytes]:
    return line.x.tobytes(), line.y.tobytes()


def _steps(x: np.ndarray) -> dict[str, Any]:
    apart = np.diff(x)
    if len(x) > 2 and (apart == apart[0]).all():
        return {"from": int(x[0]), "by": int(apart[0])}
    return {"steps": x.tolist()}


def _numbers(y: np.ndarray) -> str | float:
    if (y == y[0]).all():
        return float(y[0])
    return base64.b64encode(y.astype("<f4").tobytes()).decode("ascii")


def _marks(run: Run) -> dict[str, list[int]]:
    return {level: steps[:: -(-len(steps) // MOST_MARKS)] for level, steps in marks(run).items()}


def _chart(chart: Chart, pool: _Pool) -> dict[str, Any]:
    panels = []
    for panel in chart.panels:
        scale = panel_scale(chart, panel)
        panels.append(
            {
                "title": shown(panel.title, 200),
                "runs": [i for i, run in enumerate(pool.runs) if any(run is own for own in panel.runs)],
                "kind": scale.kind,
                "threshold": scale.threshold,
                "lines": [_line(line, pool, scale.kind == "share") for line in panel.lines],
            }
        )
    return {"name": chart.name, "unit": chart.unit, "small": chart.small, "panels": panels, "marks": MARKS}


def _line(line: Line, pool: _Pool, area: bool) -> dict[str, Any]:
    x, y = pool.add(line, area)
    return {
        "label": shown(line.label, 200),
        "color": color_name(line.index),
        "dash": DASHES[Style.of(line.index, LIGHT).dash],
        "turn": line.turn,
        "wide": line.index < 0,
        "last": last(line.y),
        "x": x,
        "y": y,
    }


def color_name(index: int) -> str:
    """What the page's style sheet calls a look's colour."""
    if index < 0:
        return {INK: "b", OTHERS: "o"}.get(index, "t")
    return f"c{index % len(LIGHT.terms)}"
