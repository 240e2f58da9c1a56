"""Charts as pictures, drawn with matplotlib."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxreg.base.extras import need
from jaxreg.watching import artists, gallery
from jaxreg.watching.charts import MARKS, Chart, Panel, marks, panel_scale
from jaxreg.watching.legend import SIZE, Entry, Legend
from jaxreg.watching.night import repainted
from jaxreg.watching.run import read_run
from jaxreg.watching.scales import Scale, put
from jaxreg.watching.style import DARK, LIGHT
from jaxreg.watching.words import shown

DPI = 120
COLORS = 128  # a picture needs no more, and is a third as large
WIDTH, BESIDE = 7.6, 10.5  # inches: of one panel, of two
SMALL = 3  # small panels in a row


@dataclasses.dataclass(frozen=True)
class Room:
    """Inches around a panel and of its height; points of what is written there."""

    left: float = 0.82
    right: float = 0.24
    top: float = 0.22  # for marks
    title: float = 0.24
    foot: float = 0.5
    height: float = 2.7
    heading: int = 11
    numbers: int = 9


ROOMY, TIGHT = Room(), Room(0.55, 0.14, 0.04, 0.24, 0.32, 1.55, 8, 7)


class Drawing:
    """One chart as a figure, or some beside each other with one legend.

    Everything is laid out in inches: matplotlib's own layouts cost as much as the drawing.

    Attributes:
      figure: matplotlib's.
    """

    def __init__(self, *charts: Chart) -> None:
        figures = need("matplotlib.figure", "plot", "a picture of a run")
        canvases = need("matplotlib.backends.backend_agg", "plot", "a picture of a run")
        self._image = need("PIL.Image", "plot", "a picture of a run")
        self.figure = figures.Figure(dpi=DPI, facecolor=LIGHT.paper)
        self._canvas = canvases.FigureCanvasAgg(self.figure)
        self._charts, self._small = charts, charts[0].small
        self._panels = [(chart, panel) for chart in charts for panel in chart.panels]
        self._columns = min(SMALL if self._small else 2, len(self._panels))
        self._width = BESIDE if self._columns > 1 and not self._small else WIDTH
        notes = [note for chart in charts for note in chart.notes]
        self._legend = Legend(self._entries(), list(dict.fromkeys(notes)), self._width, self._measure)
        self._draw()

    def pngs(self) -> tuple[bytes, bytes]:
        """The picture by day and by night."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            self._canvas.draw()
        pixels = self._image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3].copy())
        kinds = self._image
        picture = pixels.quantize(COLORS, method=kinds.Quantize.FASTOCTREE, dither=kinds.Dither.NONE)
        palette = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
        written = []
        for theme in (LIGHT, DARK):
            picture.putpalette(repainted(palette, LIGHT, theme).tobytes())
            out = io.BytesIO()
            picture.save(out, "PNG", compress_level=7)
            written.append(out.getvalue())
        return written[0], written[1]

    def _draw(self) -> None:
        room = TIGHT if self._small else ROOMY
        top = room.top + room.title * any(panel.title for _, panel in self._panels)
        rows = math.ceil(len(self._panels) / self._columns)
        row, column = top + room.height + room.foot, self._width / self._columns
        whole = np.array([self._width, rows * row + self._legend.height])
        self.figure.set_size_inches(*whole)
        drawn: dict[int, list[Any]] = {}
        for i, (chart, panel) in enumerate(self._panels):
            corner = (i % self._columns) * column, whole[1] - (i // self._columns + 1) * row
            place = np.add(corner, (room.left, room.foot)) / whole
            size = np.array([column - room.left - room.right, room.height]) / whole
            own = drawn.setdefault(id(chart), [])
            first = own[0] if own else None
            axes = self.figure.add_axes((*place, *size), sharex=first, sharey=None if self._small else first)
            own.append(axes)
            unit = chart.unit if i % self._columns == 0 or len(self._charts) > 1 else ""
            self._dress(axes, panel.title, unit, room)
            _fill(axes, panel, panel_scale(chart, panel), self._small)
        for chart in self._charts:
            _finish(chart, drawn[id(chart)])
        self._legend.draw(self.figure, self._write)

    def _dress(self, axes: Any, title: str, unit: str, room: Room) -> None:
        ink = LIGHT.ink
        axes.set_facecolor(LIGHT.paper)
        # Where the title is given a height, none is looked for.
        name = shown(title, 36 if self._small else 60)
        pad = 5 if self._small else 14
        axes.set_title(name, fontsize=room.heading, color=ink, loc="left", y=1, pad=pad, parse_math=False)
        axes.grid(color=LIGHT.faint, lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT.faint)
        axes.tick_params(which="both", colors=ink, labelsize=room.numbers, bottom=False, left=False)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == round(value) else "")
        axes.yaxis.get_offset_text().set(color=ink, fontsize=room.numbers)
        if self._small:
            axes.locator_params(nbins=4)
        else:
            axes.set_xlabel("step", color=ink)
            axes.set_ylabel(unit, color=ink)

    def _entries(self) -> list[Entry]:
        """What the legend names: every line once, then the marks."""
        share = self._charts[0].scale.kind == "share"
        sample = artists.area_sample if share else artists.line_sample
        lines = {line.label: line.index for _, panel in self._panels for line in panel.lines if line.label}
        found = {level for _, panel in self._panels for run in panel.runs for level in marks(run)}
        entries = [Entry(label, sample(index)) for label, index in lines.items()]
        return entries + [Entry(MARKS[at], artists.mark_sample(at)) for at in MARKS if at in found]

    def _measure(self, text: str) -> float:
        """Inches that it is wide."""
        properties = _text(text, SIZE).get_fontproperties()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph that no font has
            width, _, _ = self._canvas.get_renderer().get_text_width_height_descent(text, properties, False)
        return float(width) / DPI

    def _write(self, x: float, y: float, text: str, size: int) -> None:
        written = _text(text, size)
        written.set(x=x, y=y, va="center", color=LIGHT.ink, transform=self.figure.dpi_scale_trans)
        self.figure.add_artist(written)


def _fill(axes: Any, panel: Panel, scale: Scale, small: bool) -> None:
    if scale.kind == "share":
        artists.draw_areas(axes, panel.lines)
        return
    for line in panel.lines:
        artists.draw_line(axes, line, scale.kind == "log", small)
    if scale.kind == "symlog":
        axes.axhline(0, color=LIGHT.ink, lw=0.6, alpha=0.6)


def _finish(chart: Chart, drawn: Sequence[Any]) -> None:
    """What needs to know all that is drawn: the ends of the axes, and marks above them."""
    steps = [line.x for panel in chart.panels for line in panel.lines]
    steps += [run.steps for panel in chart.panels for run in panel.runs]
    first, last = min(int(x[0]) for x in steps), max(int(x[-1]) for x in steps)
    edge = max(0.01 * (last - first), 0.5, 1e-6 * max(abs(first), abs(last)))
    drawn[0].set_xlim(first - edge, last + edge)
    for axes, panel in zip(drawn, chart.panels, strict=True):
        if chart.small or axes is drawn[0]:
            put(panel_scale(chart, panel), axes)
        for run in panel.runs:
            artists.draw_marks(axes, run)


def _text(text: str, size: int) -> Any:
    """A text as it is: a "$" in a name begins no formula."""
    from matplotlib.text import Text

    return Text(0, 0, text, fontsize=size, parse_math=False)


def pictures(charts: Sequence[Chart]) -> dict[str, tuple[bytes, bytes]]:
    """Every chart by its name, by day and by night."""
    return {chart.name: Drawing(chart).pngs() for chart in charts}


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
    png, _ = Drawing(*map(_titled, charts or [gallery.nothing(runs)])).pngs()
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png)
    return picture


def _titled(chart: Chart) -> Chart:
    """The chart with its heading over its panel, for where none stands beside it."""
    panels = tuple(dataclasses.replace(panel, title=chart.heading) for panel in chart.panels)
    notes = tuple(f"{chart.heading}: {note}" for note in chart.notes)
    return dataclasses.replace(chart, panels=panels, notes=notes)
