"""A run as pictures: what every term adds, how hard it pulls, what it weighs, what takes the time."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxreg.base.extras import need
from jaxreg.core.spec import BASE
from jaxreg.watching.curves import thin
from jaxreg.watching.run import Run, read_run
from jaxreg.watching.scales import Scale, logarithmic, symmetric
from jaxreg.watching.style import DASHES, HATCHES, LIGHT, Style, Theme
from jaxreg.watching.words import shown

AREAS = 10  # terms with an area of their own in the picture of the shares
DPI = 120
COLORS = 128  # a picture needs no more, and is a third as large
LARGEST, SMALLEST = 1e60, 1e-60  # what axes can show
MARKS = (("error", "v", "exception"), ("warning", "v", "warning"), ("nonfinite", "x", "not finite"))


class Drawing:
    """Pictures of one or more runs, which share their axes, so that equal heights are equal numbers.

    Args:
      runs: each gets a panel.
      theme: colours.
    """

    def __init__(self, runs: Sequence[Run], theme: Theme = LIGHT) -> None:
        self._figure = need("matplotlib.figure", "plot", "a picture of a run").Figure
        self._canvas = need("matplotlib.backends.backend_agg", "plot", "a picture of a run").FigureCanvasAgg
        self._image = need("PIL.Image", "plot", "a picture of a run")
        self.runs, self.theme = list(runs), theme
        self.terms = list(dict.fromkeys(name for run in runs for name in run.terms))
        self._handles: dict[str, Any] = {}
        self._sizes = False  # whether the scale is logarithmic

    def contributions(self) -> bytes | None:
        """What every term adds to the loss."""
        return self._lines("contribution", "weight · value", symmetric)

    def norms(self) -> bytes | None:
        """How hard every term pulls: the norm of its weighted gradient."""
        return self._lines("grad_norm_weighted", "weight · ‖gradient‖", logarithmic)

    def weights(self) -> bytes | None:
        """What every term weighs."""
        return self._lines("weight", "weight", symmetric, [name for name in self.terms if self._weighs(name)])

    def shares(self) -> bytes | None:
        """Each term's part of the gradient, stacked to 100 %."""
        if not any(np.isfinite(run.share(BASE)).any() for run in self.runs):
            return None
        figure, panels = self._panels()
        kept = self._largest_shares()
        for axes, run in zip(panels, self.runs, strict=True):
            self._stack(axes, run, kept)
            axes.set_ylim(0, 100)
            axes.set_yticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
            self._marks(axes, run)
        return self._finished(figure)

    def timings(self) -> bytes | None:
        """What takes the time, where the loop logged it."""
        names = list(dict.fromkeys(n for run in self.runs for n in run.names if n.startswith("timings/")))
        hosted = [n for n in self.terms if any(run.has(f"reg/{n}/host_seconds") for run in self.runs)]
        if not names and not hosted:
            return None
        figure, panels = self._panels()
        self._sizes = True
        for axes, run in zip(panels, self.runs, strict=True):
            for index, name in enumerate(names):
                if run.has(name):
                    self._line(axes, run, run.series(name), name.partition("/")[2], index)
            for index, name in enumerate(hosted, len(names)):
                self._line(axes, run, run.of(name, "host_seconds"), f"{name} (host)", index)
            axes.set_ylabel("seconds" if axes is panels[0] else "")
        logarithmic(panels, self._drawn(panels))
        for axes, run in zip(panels, self.runs, strict=True):
            self._marks(axes, run)
        return self._finished(figure)

    def overview(self) -> bytes:
        """Contributions, and the norms where they are tracked, side by side: one picture for a readme."""
        run = self.runs[0]
        kinds: list[tuple[str, str, Scale]] = [
            ("contribution", "contribution to the loss (weight · value)", symmetric)
        ]
        if any(run.has(name) for name in ("grad_norm/base", *_named(run, "grad_norm_weighted"))):
            title = "norm of its gradient (weight · ‖∇value‖)"
            kinds.append(("grad_norm_weighted", title, logarithmic))
        self._handles = {}
        figure = self._figure(figsize=(6.2 * len(kinds), 4.4), dpi=DPI, layout="constrained")
        panels = [figure.add_subplot(1, len(kinds), i + 1) for i in range(len(kinds))]
        for axes, (key, title, scale) in zip(panels, kinds, strict=True):
            self._dress(axes, title)
            self._sizes = scale is logarithmic
            for index, name in enumerate((BASE, *self.terms), -1):
                self._line(axes, run, run.of(name, key), _label(name), index)
            scale([axes], self._drawn([axes]))
            self._marks(axes, run)
        return self._finished(figure)

    def _lines(self, key: str, unit: str, scale: Scale, terms: Sequence[str] | None = None) -> bytes | None:
        names = (BASE, *self.terms) if terms is None else tuple(terms)
        if not any(np.isfinite(run.of(name, key)).any() for run in self.runs for name in names):
            return None
        figure, panels = self._panels()
        self._sizes = scale is logarithmic
        for axes, run in zip(panels, self.runs, strict=True):
            for name in names:
                self._line(axes, run, run.of(name, key), _label(name), self._index(name))
            axes.set_ylabel(unit if axes is panels[0] else "")
        scale(panels, self._drawn(panels))
        for axes, run in zip(panels, self.runs, strict=True):
            self._marks(axes, run)
        return self._finished(figure)

    def _panels(self) -> tuple[Any, list[Any]]:
        """An empty figure: a panel a run, all with the same axes."""
        self._handles = {}
        count = len(self.runs)
        columns = min(2, count)
        rows = math.ceil(count / columns)
        figure = self._figure(
            figsize=(9 if count == 1 else 12, 0.6 + 3.6 * rows), dpi=DPI, layout="constrained"
        )
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[count:]:
            axes.remove()
        for axes, run in zip(grid, self.runs, strict=False):
            self._dress(axes, run.name if count > 1 else "")
            axes.tick_params(labelbottom=True)
        first = min(int(run.steps[0]) for run in self.runs)
        last = max(int(run.steps[-1]) for run in self.runs)
        edge = max(0.01 * (last - first), 0.5, 1e-6 * max(abs(first), abs(last)))
        grid[0].set_xlim(first - edge, last + edge)
        return figure, list(grid[:count])

    def _dress(self, axes: Any, title: str) -> None:
        theme = self.theme
        axes.figure.set_facecolor(theme.paper)
        axes.set_facecolor(theme.paper)
        axes.set_title(shown(title), fontsize=11, color=theme.ink, loc="left", pad=14, parse_math=False)
        axes.set_xlabel("step")
        axes.grid(color=theme.faint, lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.faint)
        axes.tick_params(which="both", colors=theme.ink, labelsize=9, length=0)
        axes.xaxis.label.set_color(theme.ink)
        axes.yaxis.label.set_color(theme.ink)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == round(value) else "")

    def _line(self, axes: Any, run: Run, values: np.ndarray, label: str, index: int) -> None:
        """A mean with its range around it; points that stand alone as dots."""
        with np.errstate(invalid="ignore"):
            sizes = np.abs(values)
            values = np.where(sizes < SMALLEST, 0.0, np.clip(values, -LARGEST, LARGEST))
            values = np.where(sizes > 0, values, np.nan) if self._sizes else values  # a logarithm has no 0
        curve, style = thin(run.steps, values), Style.of(index, self.theme)
        if not np.isfinite(curve.mean).any():
            return
        wide = 2.2 if index < 0 else 1.5
        (line,) = axes.plot(curve.x, curve.mean, color=style.color, ls=DASHES[style.dash], lw=wide)
        alone = curve.alone
        if alone.any():
            axes.plot(curve.x[alone], curve.mean[alone], "o", color=style.color, ms=3.5)
        if np.any(curve.high > curve.low):
            axes.fill_between(curve.x, curve.low, curve.high, color=style.color, alpha=0.16, lw=0)
        self._handles.setdefault(label, line)

    def _stack(self, axes: Any, run: Run, kept: Sequence[str]) -> None:
        names = [name for name in (BASE, *kept) if name == BASE or name in run.terms]
        layers = {name: thin(run.steps, 100 * run.share(name)).mean for name in names}
        layers = {name: layer for name, layer in layers.items() if np.isfinite(layer).any()}
        if not layers:
            return
        x = thin(run.steps, run.share(BASE)).x
        known = np.isfinite(np.array(list(layers.values()))).any(axis=0)
        bottom = np.where(known, 0.0, np.nan)
        if len(x) == 1:  # an area needs two ends
            x, bottom = x[0] + np.array([-0.5, 0.5]), np.repeat(bottom, 2)
        for name, layer in layers.items():
            style = Style.of(self._index(name), self.theme)
            top = bottom + np.nan_to_num(layer)
            self._area(
                axes,
                (x, bottom, top),
                _label(name),
                (style.color, HATCHES[style.dash]),
                0.55 if name == BASE else 0.9,
            )
            bottom = top
        if len(kept) < len(self.terms) and np.nanmax(100 - bottom, initial=0.0) > 1e-6:
            label = f"{len(self.terms) - len(kept)} others"
            rest = (x, bottom, np.where(np.isfinite(bottom), 100.0, np.nan))
            self._area(axes, rest, label, (self.theme.faint, None), 1.0)

    def _area(self, axes: Any, area: tuple[Any, Any, Any], label: str, look: Look, alpha: float) -> None:
        color, hatch = look
        paper = self.theme.paper
        patch = axes.fill_between(*area, facecolor=color, hatch=hatch, edgecolor=paper, lw=0.4, alpha=alpha)
        self._handles.setdefault(label, patch)

    def _largest_shares(self) -> list[str]:
        """The terms with an area of their own, in order."""
        if len(self.terms) <= AREAS + 1:
            return self.terms
        size = {
            name: sum(float(np.nansum(run.share(name))) for run in self.runs if name in run.terms)
            for name in self.terms
        }
        kept = sorted(self.terms, key=lambda name: -size[name])[:AREAS]
        return [name for name in self.terms if name in kept]

    def _marks(self, axes: Any, run: Run) -> None:
        """Above the panel, where something happened: exceptions, warnings, numbers that are not finite."""
        at: dict[str, Iterable[int]] = {
            level: [note.step for note in run.notes if note.level == level and note.step is not None]
            for level in ("error", "warning")
        }
        at["nonfinite"] = run.steps[run.nonfinite()]
        low, high = axes.get_xlim()
        for height, (level, marker, label) in zip((1.055, 1.055, 1.02), MARKS, strict=True):
            # Marks in the same place are one: a run may have thousands.
            places = {
                round((step - low) / (high - low) * 200): step for step in at[level] if low <= step <= high
            }
            if not places:
                continue
            steps, color = list(places.values()), self.theme.marks[level]
            across = axes.get_xaxis_transform()
            (mark,) = axes.plot(
                steps,
                [height] * len(steps),
                marker,
                color=color,
                ms=5,
                transform=across,
                clip_on=False,
                ls="",
            )
            if len(steps) <= 12:
                axes.vlines(steps, 0, 1, color=color, lw=0.8, alpha=0.5, transform=across, zorder=0.5)
            self._handles.setdefault(f"\0{label}", mark)  # no term has such a name

    def _drawn(self, panels: Sequence[Any]) -> np.ndarray:
        """All numbers in the panels, which the scale is chosen from."""
        curves = [np.asarray(line.get_ydata(), float) for axes in panels for line in axes.lines]
        values = np.concatenate([np.empty(0), *curves])
        return values[np.isfinite(values)]

    def _finished(self, figure: Any) -> bytes:
        """The PNG, with a legend below."""
        if self._handles:
            columns = max(1, min(len(self._handles), int(figure.get_figwidth() / 1.75)))
            # Names are set afterwards, as they are: a "_" or a "$" in front means something to a legend.
            legend = figure.legend(
                list(self._handles.values()),
                ["x"] * len(self._handles),
                loc="outside lower center",
                ncols=columns,
                frameon=False,
                fontsize=9,
                labelcolor=self.theme.ink,
                handlelength=2.6,
            )
            for text, label in zip(legend.get_texts(), self._handles, strict=True):
                text.set_parse_math(False)
                text.set_text(shown(label.removeprefix("\0"), 22))
        canvas = self._canvas(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            canvas.draw()
        pixels = self._image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        out = io.BytesIO()
        pixels.quantize(COLORS, dither=self._image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()

    def _index(self, name: str) -> int:
        return -1 if name == BASE else self.terms.index(name)

    def _weighs(self, name: str) -> bool:
        return any(np.isfinite(run.of(name, "weight")).any() for run in self.runs)


Look: TypeAlias = tuple[str, str | None]  # a colour and a hatch


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
    picture = Path(picture)
    png = Drawing([read_run(path)]).overview()
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png)
    return picture


def _label(name: str) -> str:
    return "base loss" if name == BASE else name


def _named(run: Run, key: str) -> list[str]:
    return [f"reg/{name}/{key}" for name in run.terms]
