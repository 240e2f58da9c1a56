"""Charts as pictures, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxreg.base.extras import need
from jaxreg.watching import gallery
from jaxreg.watching.charts import MARKS, Chart, Line, Panel, marks
from jaxreg.watching.curves import thin
from jaxreg.watching.legend import SIZE, Entry, Legend, Sample
from jaxreg.watching.run import Run, read_run
from jaxreg.watching.scales import put, symmetric
from jaxreg.watching.style import DARK, DASHES, HATCHES, LIGHT, OTHERS, Style, Theme
from jaxreg.watching.words import shown

DPI = 120
COLORS = 128  # a picture needs no more, and is a third as large
WIDTH, BESIDE = 7.6, 10.5  # inches: of one panel, of two
LEFT, RIGHT, TOP, FOOT = 0.82, 0.14, 0.2, 0.5  # inches around a panel: numbers, nothing, marks, the steps
SMALL = 3  # small panels in a row
SIGNS = {"error": "v", "warning": "v", "nonfinite": "x"}
Paint = Callable[[Theme], object]


class Drawing:
    """A chart's figure. What has a colour is painted anew for each theme, so that all is laid out once.

    Attributes:
      figure: matplotlib's.
    """

    def __init__(self, *charts: Chart, legend: bool = True) -> None:
        """More than one chart stand beside each other, with one legend."""
        figures = need("matplotlib.figure", "plot", "a picture of a run")
        canvases = need("matplotlib.backends.backend_agg", "plot", "a picture of a run")
        self._image = need("PIL.Image", "plot", "a picture of a run")
        self._paints: list[Paint] = []
        self.figure = figures.Figure(dpi=DPI)
        self._canvas = canvases.FigureCanvasAgg(self.figure)
        self._charts = charts
        self._legend = Legend(
            self._entries() if legend else (),
            [note for chart in charts for note in chart.notes],
            self._width,
            self._measure,
        )
        self._draw()

    def png(self, theme: Theme = LIGHT) -> bytes:
        """The picture in a theme's colours."""
        for paint in self._paints:
            paint(theme)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            self._canvas.draw()
        pixels = self._image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3].copy())
        out = io.BytesIO()
        pixels.quantize(COLORS, method=self._image.Quantize.FASTOCTREE, dither=self._image.Dither.NONE).save(
            out, "PNG", compress_level=7
        )
        return out.getvalue()

    @property
    def _panels(self) -> list[tuple[Chart, Panel]]:
        return [(chart, panel) for chart in self._charts for panel in chart.panels]

    @property
    def _columns(self) -> int:
        return min(SMALL if self._charts[0].small else 2, len(self._panels))

    @property
    def _width(self) -> float:
        return BESIDE if len(self._panels) > 1 and not self._charts[0].small else WIDTH

    def _measure(self, text: str) -> float:
        """Inches that it is wide."""
        properties = self._figure_text(text, SIZE).get_fontproperties()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph that no font has
            width, _, _ = self._canvas.get_renderer().get_text_width_height_descent(text, properties, False)
        return float(width) / DPI

    def _figure_text(self, text: str, size: int) -> Any:
        from matplotlib.text import Text

        return Text(0, 0, text, fontsize=size, parse_math=False)

    def _draw(self) -> None:
        panels, small = self._panels, self._charts[0].small
        rows, width = math.ceil(len(panels) / self._columns), self._width
        titled = any(panel.title for _, panel in panels)
        left, foot, top = (0.55, 0.32, 0.28) if small else (LEFT, FOOT, TOP + 0.24 * titled)
        each = 1.55 if small else 2.7
        below = self._legend.height
        height = rows * (top + each + foot) + below
        self.figure.set_size_inches(width, height)
        self._paints.append(lambda theme: self.figure.set_facecolor(theme.paper))
        across = width / self._columns
        shared: dict[int, Any] = {}
        for i, (chart, panel) in enumerate(panels):
            row, column = divmod(i, self._columns)
            corner = (column * across + left, below + foot + (rows - 1 - row) * (top + each + foot))
            box = (corner[0] / width, corner[1] / height, (across - left - RIGHT) / width, each / height)
            first = None if small else shared.get(id(chart))
            axes = self.figure.add_axes(box, sharex=first, sharey=first)
            shared.setdefault(id(chart), axes)
            self._dress(axes, panel.title, chart.unit if column == 0 or len(self._charts) > 1 else "", small)
            self._fill(axes, chart, panel, first is None)
        self._legend.draw(self.figure, self._write)

    def _fill(self, axes: Any, chart: Chart, panel: Panel, first: bool) -> None:
        if chart.scale.kind == "share":
            self._stack(axes, panel.lines)
        else:
            for line in panel.lines:
                self._line(axes, line, chart.scale.kind == "log", chart.small)
        if first:
            self._set_steps(axes, [panel] if chart.small else chart.panels)
            put(symmetric([line.y for line in panel.lines]) if chart.small else chart.scale, axes)
        if chart.scale.kind == "symlog":
            zero = axes.axhline(0, lw=0.6, alpha=0.6)
            self._paints.append(lambda theme: zero.set_color(theme.ink))
        for run in panel.runs:
            self._marks(axes, run)

    def _set_steps(self, axes: Any, panels: Sequence[Panel]) -> None:
        steps = [line.x for panel in panels for line in panel.lines]
        first, last = min(int(x[0]) for x in steps), max(int(x[-1]) for x in steps)
        edge = max(0.01 * (last - first), 0.5, 1e-6 * max(abs(first), abs(last)))
        axes.set_xlim(first - edge, last + edge)

    def _dress(self, axes: Any, title: str, unit: str, small: bool) -> None:
        size = 8 if small else 11
        name = axes.set_title(
            shown(title, 40 if small else 60), fontsize=size, loc="left", pad=4 if small else 14, parse_math=False
        )
        axes.grid(lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7 if small else 9, length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == round(value) else "")
        if small:
            axes.locator_params(axis="x", nbins=4)
            axes.locator_params(axis="y", nbins=4)
        else:
            axes.set_xlabel("step")
            axes.set_ylabel(unit)

        def paint(theme: Theme) -> None:
            axes.set_facecolor(theme.paper)
            axes.spines[["left", "bottom"]].set_color(theme.faint)
            axes.tick_params(which="both", colors=theme.ink)
            axes.grid(color=theme.faint)
            for text in (name, axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
                text.set_color(theme.ink)

        self._paints.append(paint)

    def _line(self, axes: Any, line: Line, logarithmic: bool, small: bool) -> None:
        """A mean with its range around it; points that stand alone as dots."""
        values = np.where(line.y > 0, line.y, np.nan) if logarithmic else line.y  # a logarithm has no 0
        curve = thin(line.x, values)
        if not np.isfinite(curve.mean).any():
            return
        dash = Style.of(line.index, LIGHT).dash
        wide = (2.0 if line.index < 0 else 1.5) * (0.8 if small else 1)
        (drawn,) = axes.plot(curve.x, curve.mean, ls=pattern(dash, line.turn), lw=wide, dash_capstyle="butt")
        parts = [drawn]
        alone = curve.alone
        if alone.any():
            parts += axes.plot(curve.x[alone], curve.mean[alone], "o", ms=3.5)
        if np.any(curve.high > curve.low):
            parts.append(axes.fill_between(curve.x, curve.low, curve.high, alpha=0.16, lw=0))
        self._paint(line.index, *parts)

    def _paint(self, index: int, *artists: Any) -> None:
        for artist in artists:
            self._paints.append(lambda theme, artist=artist: artist.set_color(Style.of(index, theme).color))

    def _stack(self, axes: Any, lines: Sequence[Line]) -> None:
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
            area = axes.fill_between(x, bottom, top, hatch=hatch(line.index), lw=0.4, alpha=0.85)
            self._paints.append(lambda theme, area=area, i=line.index: paint_area(area, i, theme))
            bottom = top

    def _marks(self, axes: Any, run: Run) -> None:
        """Above the panel, where something happened."""
        low, high = axes.get_xlim()
        across = axes.get_xaxis_transform()
        for level, steps in marks(run).items():
            # Marks in the same place are one: a run may have thousands.
            places = list({round((step - low) / (high - low) * 200): step for step in steps}.values())
            height = 1.02 if level == "nonfinite" else 1.045
            (mark,) = axes.plot(
                places, [height] * len(places), SIGNS[level], ms=5, transform=across, clip_on=False, ls=""
            )
            parts = [mark]
            if len(places) <= 12:
                parts.append(axes.vlines(places, 0, 1, lw=0.8, alpha=0.5, transform=across, zorder=0.5))
            for part in parts:
                self._paints.append(lambda theme, p=part, at=level: p.set_color(theme.marks[at]))

    def _entries(self) -> list[Entry]:
        """What the legend names: every line once, then the marks."""
        share = self._charts[0].scale.kind == "share"
        lines = {line.label: line for _, panel in self._panels for line in panel.lines if line.label}
        entries = [
            Entry(label, self._area_sample(line.index) if share else self._line_sample(line.index))
            for label, line in lines.items()
        ]
        found = {level for _, panel in self._panels for run in panel.runs for level in marks(run)}
        return entries + [Entry(what, self._mark_sample(level)) for level, what in MARKS.items() if level in found]

    def _line_sample(self, index: int) -> Sample:
        dash = Style.of(index, LIGHT).dash

        def draw(figure: Any, x0: float, x1: float, y: float) -> None:
            wide = 2.0 if index < 0 else 1.6
            self._paint(index, self._sample([x0, x1], [y, y], ls=pattern(dash), lw=wide, dash_capstyle="butt"))

        return draw

    def _area_sample(self, index: int) -> Sample:
        def draw(figure: Any, x0: float, x1: float, y: float) -> None:
            from matplotlib.patches import Rectangle

            box = Rectangle(
                (x0, y - 0.05), x1 - x0, 0.1, transform=figure.dpi_scale_trans, hatch=hatch(index), lw=0.4, alpha=0.85
            )
            figure.add_artist(box)
            self._paints.append(lambda theme: paint_area(box, index, theme))

        return draw

    def _mark_sample(self, level: str) -> Sample:
        def draw(figure: Any, x0: float, x1: float, y: float) -> None:
            mark = self._sample([(x0 + x1) / 2], [y], marker=SIGNS[level], ms=5, ls="")
            self._paints.append(lambda theme: mark.set_color(theme.marks[level]))

        return draw

    def _sample(self, x: list[float], y: list[float], **look: Any) -> Any:
        from matplotlib.lines import Line2D

        return self.figure.add_artist(Line2D(x, y, transform=self.figure.dpi_scale_trans, **look))

    def _write(self, x: float, y: float, text: str, size: int) -> None:
        written = self._figure_text(text, size)
        written.set(x=x, y=y, va="center", transform=self.figure.dpi_scale_trans)
        self.figure.add_artist(written)
        self._paints.append(lambda theme: written.set_color(theme.ink))


def pattern(dash: int, turn: tuple[int, int] = (0, 1), stroke: float = 6.0) -> Any:
    """Matplotlib's line style. Of equal lines each draws its stroke and leaves room for the others'."""
    place, of = turn
    if of > 1:
        return (-stroke * place, (stroke, stroke * (of - 1)))
    return (0, DASHES[dash]) if DASHES[dash] else "solid"


def hatch(index: int) -> str | None:
    """That of an area."""
    return None if index == OTHERS else HATCHES[Style.of(index, LIGHT).dash % len(HATCHES)]


def paint_area(area: Any, index: int, theme: Theme) -> None:
    """Give an area its colour, and its hatch that of the paper."""
    area.set_facecolor(Style.of(index, theme).color)
    area.set_edgecolor(theme.paper)


def pictures(charts: Sequence[Chart]) -> dict[str, tuple[bytes, bytes]]:
    """Every chart by its name, by day and by night."""
    drawn = {chart.name: Drawing(chart) for chart in charts}
    return {name: (drawing.png(LIGHT), drawing.png(DARK)) for name, drawing in drawn.items()}


def plot(path: str | os.PathLike[str], picture: str | os.PathLike[str] = "terms.png") -> Path:
    """Draw a run's contributions and gradient norms into one PNG.

    Args:
      path: the run's JSONL file.
      picture: where the PNG goes.

    Returns:
      The picture's path.

    Raises:
      ImportError: matplotlib is missing; the extra ``plot`` brings it.
      ValueError: the file holds no step.

    Example:
      >>> import tempfile
      >>> line = '{"step": 5, "loss_total": 2.5, "base_loss": {"value": 2.5}, "regularizers": {}}'
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "run.jsonl").write_text(line)
      ...     plot(Path(folder, "run.jsonl"), Path(folder, "terms.png")).name
      'terms.png'
    """
    runs = [read_run(path)]
    charts = [chart for make in (gallery.contributions, gallery.norms) if (chart := make(runs)) is not None]
    png = Drawing(*map(titled, charts)).png()
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png)
    return picture


def titled(chart: Chart) -> Chart:
    """The chart with its heading over its panel, for where none stands beside it."""
    import dataclasses

    panels = tuple(dataclasses.replace(panel, title=chart.heading) for panel in chart.panels)
    return dataclasses.replace(chart, panels=panels)
