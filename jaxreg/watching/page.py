"""The page of a report: what stands on it, from top to bottom."""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Sequence

import numpy as np

from jaxreg.core.spec import BASE
from jaxreg.watching import live
from jaxreg.watching.charts import Chart
from jaxreg.watching.conflicts import conflicts
from jaxreg.watching.legend import sentence
from jaxreg.watching.records import Note
from jaxreg.watching.run import Run
from jaxreg.watching.style import DARK, LIGHT, Theme
from jaxreg.watching.summary import ending, last, mean
from jaxreg.watching.tables import differences, last_steps, summaries
from jaxreg.watching.words import duration, escaped, number, percent, when

MOST_NOTES = 50  # of a kind; the rest is counted
LONGEST = 400  # characters of a message
LARGEST = 2_850_000  # bytes of a page, where its pictures leave room for its numbers
HOW_TO = (
    "Point at a chart to read its numbers. Drag to zoom; a double click or Esc shows all steps again. "
    "Click a name to hide it, with Shift to see it alone. With the keyboard: Tab to a chart, arrows to move, "
    "Shift for ten steps."
)


class Page:
    """The page's parts, from top to bottom. Whatever comes from a file goes through `escaped`."""

    def __init__(
        self,
        runs: Sequence[Run],
        charts: Sequence[Chart],
        pictures: dict[str, tuple[bytes, bytes]],
        title: str,
    ) -> None:
        self._runs, self._charts, self._pictures, self._title = runs, charts, pictures, title

    def html(self) -> str:
        """All of it."""
        body = "\n".join(
            part
            for part in (
                self._header(),
                *map(self._figure, self._charts),
                *summaries(self._runs),
                *differences(self._runs),
                *conflicts(self._runs),
                *(self._notes(run) for run in self._runs),
                *(self._compiles(run) for run in self._runs),
            )
            if part
        )
        scripts = live.scripts()
        numbers = live.data(self._charts, min(live.ROOM, LARGEST - len(body) - sum(map(len, scripts))))
        policy = (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src {' '.join(map(live.digest, scripts))}"
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escaped(self._title)} · jaxreg</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
            f"<body>\n{body}\n</main>\n"
            f'<script type="application/json" id="numbers">{numbers}</script>\n'
            + "".join(f"<script>{script}</script>\n" for script in scripts)
            + "</body>\n</html>\n"
        )

    def _header(self) -> str:
        cards = "".join(self._card(run) for run in self._runs)
        return (
            f'<header>\n<h1>{escaped(self._title)}</h1>\n<div class="cards">{cards}</div>\n'
            f'<p class="how">{HOW_TO}</p>\n</header>\n<main>'
        )

    def _card(self, run: Run) -> str:
        """What one wants to know first."""
        steps, levels = run.steps, collections.Counter(note.level for note in run.notes)
        times = run.series("time") if run.has("time") else np.full(len(steps), math.nan)
        known = np.flatnonzero(np.isfinite(times))
        means = last_steps(run)
        facts = [("steps", f"{len(steps):,}" + (f" ({steps[0]:,} to {steps[-1]:,})" if steps[0] else ""))]
        for what, values in (("loss", run.series("loss/total")), ("base loss", run.of(BASE, "value"))):
            facts.append((f"{what}, last", number(last(values))))
            if len(ending(values)) > 1:
                facts.append((f"{what}, {means}", number(mean(ending(values)))))
        if len(known):
            facts.append(("begun", when(float(times[known[0]]))))
        if len(known) > 1 and (took := float(times[known[-1]] - times[known[0]])) > 0:
            pace = float(steps[known[-1]] - steps[known[0]]) / took
            facts.append(("took", f"{duration(took)}, {pace:.3g} steps/s"))
        bad = [
            ("exceptions", levels["error"]),
            ("warnings", levels["warning"]),
            ("steps not finite", int(run.nonfinite().sum())),
            ("lines skipped", run.skipped),
        ]
        cells = "".join(f"<div><dt>{what}</dt><dd>{escaped(value)}</dd></div>" for what, value in facts)
        cells += "".join(
            f'<div class="bad"><dt>{what}</dt><dd>{count:,}</dd></div>' for what, count in bad if count
        )
        name = f"<h2>{escaped(run.name)}</h2>" if len(self._runs) > 1 else ""
        return f'<section class="card">{name}<dl>{cells}</dl></section>'

    def _figure(self, chart: Chart) -> str:
        """A picture, which the script replaces by a chart that one can point at."""
        light, dark = map(data_uri, self._pictures[chart.name])
        notes = "".join(f'<p class="hidden">{escaped(sentence(note), 4000)}</p>\n' for note in chart.notes)
        return (
            f'<section>\n<h2>{chart.heading}</h2>\n<p class="says">{chart.says}</p>\n'
            f'<figure class="plot" id="chart-{chart.name}"><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escaped(alt(chart, self._runs), LONGEST)}"></picture></figure>\n'
            f"{notes}</section>"
        )

    def _notes(self, run: Run) -> str:
        notes = [note for note in run.notes if note.level != "compile"]
        return self._list(run, notes, "Warnings and exceptions")

    def _compiles(self, run: Run) -> str:
        return self._list(run, [note for note in run.notes if note.level == "compile"], "Compiled programs")

    def _list(self, run: Run, notes: Sequence[Note], heading: str) -> str:
        if not notes:
            return ""
        # What comes first tells most, and what comes last how it ended.
        shown_notes = (
            notes if len(notes) <= MOST_NOTES else (*notes[: MOST_NOTES // 2], *notes[-MOST_NOTES // 2 :])
        )
        items = [_note(note) for note in shown_notes]
        if left := len(notes) - len(shown_notes):
            items.insert(MOST_NOTES // 2, f'<li class="left">… {left:,} more …</li>')
        name = f": {escaped(run.name)}" if len(self._runs) > 1 else ""
        count = f' <small class="count">{len(notes):,}</small>'
        return (
            f'<section>\n<h2>{heading}{name}{count}</h2>\n<ol class="notes">{"".join(items)}</ol>\n</section>'
        )


def alt(chart: Chart, runs: Sequence[Run]) -> str:
    """A chart in words: where its largest curves end."""
    said = []
    show = percent if chart.scale.kind == "share" else number
    whole = 100 if chart.scale.kind == "share" else 1
    for panel in chart.panels:
        ends = [(line.label, mean(ending(line.y)) / whole) for line in panel.lines]
        known = sorted((e for e in ends if math.isfinite(e[1])), key=lambda end: -abs(end[1]))
        curves = ", ".join(f"{label} {show(end)}".strip() for label, end in known[:5])
        of = panel.title or (runs[0].name if len(runs) == 1 else "it")
        said.append(f"{of} ends with {curves or 'no number'}")
    span = f"steps {min(r.steps[0] for r in runs):,} to {max(r.steps[-1] for r in runs):,}"
    return f"{chart.heading} over {span}. {'; '.join(said)}."


def style_sheet() -> str:
    """The page's look, the library's, and the terms' colours."""

    def colours(theme: Theme) -> str:
        named = {"b": theme.base, "t": theme.total, "o": theme.faint} | theme.marks
        named |= {f"c{i}": colour for i, colour in enumerate(theme.terms)}
        return "html { " + " ".join(f"--{name}: {colour};" for name, colour in named.items()) + " }"

    names = ["b", "t", "o", *(f"c{i}" for i in range(len(LIGHT.terms)))]
    lines = "".join(
        f".{name} {{ stroke: var(--{name}) }} .area.{name} {{ stroke: var(--{name}); stroke-width: 8 }}\n"
        for name in names
    )
    return (
        f"{live.static('uPlot.min.css')}\n{live.static('report.css')}{lines}{colours(LIGHT)}\n"
        f"@media (prefers-color-scheme: dark) {{ {colours(DARK)} }}\n"
    )


def _note(note: Note) -> str:
    step = "" if note.step is None else f"step {note.step:,}"
    what = {"error": "exception", "compile": "compile"}.get(note.level) or str(
        note.details.get("kind") or "warning"
    )
    return (
        f'<li class="{note.level}"><span class="step">{step}</span><span class="kind">{escaped(what)}</span>'
        f"<span>{escaped(note.text, LONGEST)}</span></li>"
    )


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
