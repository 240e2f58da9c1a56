"""The page of a report: what stands on it, from top to bottom."""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Callable, Iterable, Sequence
from importlib import resources

import numpy as np

from jaxreg.core.spec import BASE, TOTAL
from jaxreg.watching.plots import Drawing
from jaxreg.watching.records import Note
from jaxreg.watching.run import Run
from jaxreg.watching.style import DARK, LIGHT, Style, Theme
from jaxreg.watching.summary import Facts, ending, mean, summary
from jaxreg.watching.words import called, duration, escaped, number, percent, when

MOST_NOTES = 50  # of a kind; the rest is counted
LONGEST = 400  # characters of a message
DASHARRAYS = ("", "7 3", "2 2.4", "8 3 2 3")

PICTURES: tuple[tuple[str, str, str, Callable[[Drawing], bytes | None]], ...] = (
    (
        "contributions",
        "Contributions",
        "What every term adds to the loss: its weight times its value. A line is a mean over some "
        "steps, the band around it goes from the least to the greatest.",
        Drawing.contributions,
    ),
    (
        "gradient-share",
        "Share of the gradient",
        "Each term's weighted gradient norm, as a part of the sum of all of them: not of the norm of the "
        "total, in which gradients may cancel.",
        Drawing.shares,
    ),
    (
        "gradient-norms",
        "Gradient norms",
        "How hard every term pulls: the norm of its gradient times its weight. A weight of 0 has no place "
        "on this scale.",
        Drawing.norms,
    ),
    ("weights", "Weights", "What every regularizer weighs.", Drawing.weights),
    ("timings", "Timings", "Seconds a step, as far as they were logged.", Drawing.timings),
)


class Page:
    """The page's parts, from top to bottom. Whatever comes from a file goes through `escaped`."""

    def __init__(self, runs: Sequence[Run], pictures: dict[str, tuple[bytes, bytes]], title: str) -> None:
        self._runs, self._pictures, self._title = runs, pictures, title
        self._facts = [summary(run) for run in runs]
        self._terms = list(dict.fromkeys(name for run in runs for name in run.terms))

    def html(self) -> str:
        """All of it."""
        body = "\n".join(
            part
            for part in (
                self._header(),
                *(self._picture(*picture[:3]) for picture in PICTURES),
                *(self._summary(run, facts) for run, facts in zip(self._runs, self._facts, strict=True)),
                *(self._differences(i) for i in range(1, len(self._runs))),
                *(self._notes(run) for run in self._runs),
                *(self._compiles(run) for run in self._runs),
            )
            if part
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escaped(self._title)} · jaxreg</title>\n<style>\n{self._css()}</style>\n</head>\n"
            f"<body>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def _css(self) -> str:
        css = resources.files("jaxreg.watching").joinpath("report.css").read_text(encoding="utf-8")

        def colours(theme: Theme) -> str:
            named = {"b": theme.base} | {f"c{i}": colour for i, colour in enumerate(theme.terms)}
            return "".join(f".{name} {{ stroke: {colour} }} " for name, colour in named.items())

        return f"{css}{colours(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {colours(DARK)}}}\n"

    def _header(self) -> str:
        cards = "".join(self._card(run) for run in self._runs)
        return (
            f'<header>\n<h1>{escaped(self._title)}</h1>\n<div class="cards">{cards}</div>\n</header>\n<main>'
        )

    def _card(self, run: Run) -> str:
        """What one wants to know first."""
        steps, levels = run.steps, collections.Counter(note.level for note in run.notes)
        times = run.series("time") if run.has("time") else np.full(len(steps), math.nan)
        known = np.flatnonzero(np.isfinite(times))
        facts = [
            ("steps", f"{len(steps):,}" + (f" ({steps[0]:,} to {steps[-1]:,})" if steps[0] else "")),
            ("loss at the end", number(mean(ending(run.series("loss/total"))))),
            ("base loss at the end", number(mean(ending(run.of(BASE, "value"))))),
        ]
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

    def _picture(self, name: str, heading: str, says: str) -> str:
        if name not in self._pictures:
            return ""
        light, dark = map(data_uri, self._pictures[name])
        alt = escaped(self._alt(name, heading), LONGEST)
        wide = " wide" if len(self._runs) > 1 else ""
        return (
            f'<section>\n<h2>{heading}</h2>\n<p class="says">{says}</p>\n'
            f'<figure class="plot{wide}" tabindex="0"><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{alt}"></picture></figure>\n</section>'
        )

    def _alt(self, name: str, heading: str) -> str:
        """The picture in words: where its largest curves end."""
        said = []
        for run in self._runs:
            ends = [(what, mean(ending(values))) for what, values in _curves(run, name)]
            known = sorted((e for e in ends if math.isfinite(e[1])), key=lambda end: -abs(end[1]))
            show = percent if name == "gradient-share" else number
            curves = ", ".join(f"{called(what)} {show(end)}" for what, end in known[:5])
            said.append(f"{run.name} ends with {curves or 'no number'}")
        span = f"steps {min(r.steps[0] for r in self._runs):,} to {max(r.steps[-1] for r in self._runs):,}"
        return f"{heading} over {span}. {'; '.join(said)}."

    def _summary(self, run: Run, facts: Sequence[Facts]) -> str:
        heads = ("term", "last", "mean, last 10 %", "min", "max", "weight", "grad share", "not finite")
        rows = []
        for f in facts:
            there = "" if f.steps == len(run.steps) else f' <small class="part">in {f.steps:,} steps</small>'
            rows.append(
                [
                    self._named(f.name) + there,
                    *map(number, (f.last, f.end, f.least, f.greatest, f.weight)),
                    percent(f.share),
                    f'<span class="bad">{f.nonfinite:,}</span>' if f.nonfinite else "0",
                ]
            )
        heading = "Summary" + (f": {escaped(run.name)}" if len(self._runs) > 1 else "")
        says = "Of each term's contribution; its weight is that of the last step, its share of the gradient "
        says += "the mean over the last 10 %."
        return f'<section>\n<h2>{heading}</h2>\n<p class="says">{says}</p>\n{table(heads, rows)}\n</section>'

    def _differences(self, index: int) -> str:
        """How the end of a run differs from that of the first."""
        first, other = self._runs[0], self._runs[index]
        ours, theirs = ({f.name: f for f in self._facts[i]} for i in (0, index))
        a, b = escaped(first.name), escaped(other.name)
        rows = []
        for name in (BASE, *self._terms, TOTAL):
            left, right = ours.get(name), theirs.get(name)
            if left is None and right is None:
                continue
            cell = self._named(name)
            if left is None or right is None:
                cell += f' <small class="part">only in {b if left is None else a}</small>'
            was, now = (math.nan if f is None else f.end for f in (left, right))
            shares = [math.nan if f is None else f.share for f in (left, right)]
            change = now - was
            sign = "+" if change > 0 else ""
            relative = sign + percent(change / abs(was)) if was else "–"
            rows.append(
                [cell, *map(number, (was, now)), sign + number(change), relative, *map(percent, shares)]
            )
        heads = ("term", a, b, "difference", "relative", f"grad share, {a}", f"grad share, {b}")
        return (
            f"<section>\n<h2>Differences: {b} against {a}</h2>\n"
            '<p class="says">Means of the contributions over the last 10 % of each run.</p>\n'
            f"{table(heads, rows)}\n</section>"
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

    def _named(self, name: str) -> str:
        """A term's name beside the line that it is drawn with."""
        if name == TOTAL:
            return '<span class="swatch"></span>total'
        index = -1 if name == BASE else self._terms.index(name)
        colour = "b" if index < 0 else f"c{index % len(LIGHT.terms)}"
        dash = DASHARRAYS[Style.of(index, LIGHT).dash]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return (
            '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true">'
            f'<path class="{colour}" d="M0 4h26"{dashed}/></svg>{escaped(called(name))}'
        )


def _curves(run: Run, picture: str) -> list[tuple[str, np.ndarray]]:
    """What a picture shows of a run, by name."""
    if picture == "timings":
        return [(n.partition("/")[2], run.series(n)) for n in run.names if n.startswith("timings/")]
    if picture == "gradient-share":
        return [(name, run.share(name)) for name in (BASE, *run.terms)]
    key = {"contributions": "contribution", "gradient-norms": "grad_norm_weighted", "weights": "weight"}[
        picture
    ]
    names = run.terms if picture == "weights" else (BASE, *run.terms)
    return [(name, run.of(name, key)) for name in names]


def _note(note: Note) -> str:
    step = "" if note.step is None else f"step {note.step:,}"
    what = {"error": "exception", "compile": "compile"}.get(note.level) or str(
        note.details.get("kind") or "warning"
    )
    return (
        f'<li class="{note.level}"><span class="step">{step}</span><span class="kind">{escaped(what)}</span>'
        f"<span>{escaped(note.text, LONGEST)}</span></li>"
    )


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells that are HTML already; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
