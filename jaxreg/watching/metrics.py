"""The numbers that terms report of themselves and that the loop logs besides: accuracy, learning rate, ..."""

from __future__ import annotations

from collections.abc import Sequence

from jaxreg.core.spec import BASE, RESERVED_METRICS
from jaxreg.watching.charts import Chart, Line, Panel, listed, shown
from jaxreg.watching.run import Run
from jaxreg.watching.scales import Scale, plain
from jaxreg.watching.style import INK, LIGHT
from jaxreg.watching.words import called

MOST_PANELS = 24
SCHEMA = frozenset(
    {"time", "loss/total", "loss/base", "loss/regularizer_total", "grad_norm/total", "grad_norm/base"}
)
ELSEWHERE = frozenset({*RESERVED_METRICS, "host_seconds"})  # these have charts of their own


def logged(run: Run) -> list[str]:
    """The names of what the loop logged besides, as ``log(metrics=...)`` does.

    Example:
      >>> from jaxreg.watching.records import parse
      >>> run = Run()
      >>> run.add(parse(b'{"loss_total": 1, "base_loss": {"value": 1}, "metrics": {"optim/lr": 0.1}}'))
      >>> logged(run)
      ['optim/lr']
    """
    own = tuple([f"reg/{name}/" for name in run.terms] + ["timings/", "loss/base/"])
    return [name for name in run.names if name not in SCHEMA and not name.startswith(own)]


def reported(run: Run) -> dict[str, list[str]]:
    """The names of the terms' own metrics, and which terms have each."""
    found: dict[str, list[str]] = {}
    for term, prefix in ((BASE, "loss/base/"), *((name, f"reg/{name}/") for name in run.terms)):
        for name in run.names:
            key = name.removeprefix(prefix)
            if key != name and key not in ELSEWHERE:
                found.setdefault(key, []).append(term)
    return found


def metrics(runs: Sequence[Run]) -> Chart | None:
    """A small panel a metric: what was logged first, then the terms', all terms that have it together."""
    panels = [_logged_panel(runs, name) for name in dict.fromkeys(n for r in runs for n in logged(r))]
    known = [reported(run) for run in runs]
    for key in dict.fromkeys(key for found in known for key in found):
        terms = list(dict.fromkeys(term for found in known for term in found.get(key, [])))
        panels.append(_term_panel(runs, key, terms))
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return None
    left = [panel.title for panel in panels[MOST_PANELS:]]
    notes = (f"in the file only, for want of room: {listed(left)}.",) if left else ()
    says = "What the loop logged besides, and what terms report of themselves."
    kept = tuple(panels[:MOST_PANELS])
    return Chart("metrics", "Metrics", says, "", Scale(), kept, True, notes, plain)


def _logged_panel(runs: Sequence[Run], name: str) -> Panel:
    lines = [
        Line(run.name if len(runs) > 1 else "", run.steps, run.series(name), i)
        for i, run in enumerate(runs)
        if name in run.names
    ]
    return Panel(name, shown(lines), ())


def _term_panel(runs: Sequence[Run], key: str, terms: Sequence[str]) -> Panel:
    """One metric of all terms that have it. A run has a line style where there are several."""
    one, several = len(terms) == 1, len(runs) > 1
    names = list(dict.fromkeys(name for run in runs for name in run.terms))
    lines = []
    for i, run in enumerate(runs):
        for term in terms:
            index = INK if term == BASE else names.index(term)
            label = run.name if one else f"{called(term)}, {run.name}"
            if several:
                index = i if one else max(index, 0) + i * len(LIGHT.terms)
            lines.append(Line(label if several else called(term), run.steps, run.of(term, key), index))
    return Panel(f"{key} · {called(terms[0])}" if one else key, shown(lines), ())
