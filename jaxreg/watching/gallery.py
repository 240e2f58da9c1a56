"""The charts of a report, from top to bottom, made out of its runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxreg.core.spec import BASE
from jaxreg.watching import style
from jaxreg.watching.charts import Chart, Line, Panel, lines_chart, listed, shown
from jaxreg.watching.metrics import metrics
from jaxreg.watching.run import Run
from jaxreg.watching.scales import Choice, Scale, logarithmic, symmetric
from jaxreg.watching.words import called

AREAS = 10  # terms with an area of their own in the picture of the shares
MOST_SMALL = 24  # small panels of a chart

TOTAL, BASE_LINE, REST = "total", called(BASE), "all regularizers"
NORM, WEIGHTED_NORM = "‖gradient‖", "weight · ‖gradient‖"


def gallery(runs: Sequence[Run]) -> list[Chart]:
    """The charts that have something to show."""
    makers: tuple[Callable[[Sequence[Run]], Chart | None], ...] = (
        loss, contributions, compared, shares, norms, weights, values, own_norms, metrics, timings,
    )  # fmt: skip
    return [chart for make in makers if (chart := make(runs)) is not None]


def loss(runs: Sequence[Run]) -> Chart | None:
    """The total and what it is the sum of; runs over one another."""
    lines = []
    for i, run in enumerate(runs):
        parts = {TOTAL: ("loss/total", style.TOTAL, i)}
        if run.terms:
            parts[BASE_LINE] = ("loss/base", style.INK, i + len(style.LIGHT.terms))
        if run.terms and len(runs) == 1:
            parts[REST] = ("loss/regularizer_total", style.REST, 0)
        for label, (name, alone, beside) in parts.items():
            if name in run.names:
                several = len(runs) > 1
                named = f"{label}, {run.name}" if several else label
                lines.append(Line(named, run.steps, run.series(name), beside if several else alone))
    says = "What is minimized: the base loss and every weight times its value."
    return lines_chart("loss", "Loss", says, "loss", symmetric, [Panel("", tuple(lines), tuple(runs))])


def contributions(runs: Sequence[Run]) -> Chart | None:
    """What every term adds to the loss."""
    says = "What every term adds to the loss: its weight times its value."
    return _by_run(runs, "contributions", "Contributions", says, "weight · value", "contribution", symmetric)


def nothing(runs: Sequence[Run]) -> Chart:
    """A chart of runs in which no number is finite: what happened is marked, all the same."""
    panels = tuple(Panel(run.name if len(runs) > 1 else "", (), (run,)) for run in runs)
    says = "No number of the run is finite."
    return Chart("contributions", "Contributions", says, "weight · value", Scale(), panels, notes=(says,))


def values(runs: Sequence[Run]) -> Chart | None:
    """What every term measures."""
    says = "What every term measures, before its weight."
    if not any(run.terms for run in runs):
        return None
    return _by_run(runs, "values", "Unweighted values", says, "value", "value", symmetric)


def norms(runs: Sequence[Run]) -> Chart | None:
    """How hard every term pulls: the norm of its weighted gradient."""
    says = "How hard every term pulls: its weight times the norm of its gradient. The total is the norm of "
    says += "the sum, in which gradients may cancel."
    key = "grad_norm_weighted"
    return _by_run(runs, "gradient-norms", "Weighted gradient norms", says, WEIGHTED_NORM, key, logarithmic)


def own_norms(runs: Sequence[Run]) -> Chart | None:
    """How hard every term would pull with weight 1."""
    if not any(run.terms for run in runs):
        return None
    says = "The norm of the gradient of every term's value, before its weight."
    heading = "Unweighted gradient norms"
    return _by_run(runs, "gradient-norms-unweighted", heading, says, NORM, "grad_norm", logarithmic)


def weights(runs: Sequence[Run]) -> Chart | None:
    """What every term weighs."""
    says = "What every regularizer weighs."
    return _by_run(runs, "weights", "Weights", says, "weight", "weight", symmetric, base=False)


def shares(runs: Sequence[Run]) -> Chart | None:
    """Each term's part of the gradient, stacked to 100 %."""
    terms, known = terms_of(runs), [run.shares() for run in runs]
    kept = _largest(terms, known)
    panels = []
    for run, part in zip(runs, known, strict=True):
        own = [name for name in (BASE, *kept) if name in part]
        lines = [Line(called(n), run.steps, 100 * part[n], _index(terms, n)) for n in own]
        rest = [100 * part[name] for name in run.terms if name not in kept]
        if rest:
            label = f"{len(terms) - len(kept)} others"
            lines.append(Line(label, run.steps, np.nansum(rest, axis=0) + 0 * lines[0].y, style.OTHERS))
        panels.append(Panel(run.name if len(runs) > 1 else "", shown(lines), (run,)))
    if not any(panel.lines for panel in panels):
        return None
    says = "Each term's weighted gradient norm, as a part of the sum of all of them: not of the norm of the "
    says += "total, in which gradients may cancel."
    heading = "Share of the gradient"
    return Chart("gradient-share", heading, says, "share", Scale("share"), tuple(panels))


def compared(runs: Sequence[Run]) -> Chart | None:
    """A small panel a term, the runs over one another."""
    if len(runs) == 1:
        return None
    panels = []
    for name in (BASE, *terms_of(runs)):
        lines = [Line(r.name, r.steps, r.of(name, "contribution"), i) for i, r in enumerate(runs)]
        if known := shown(lines):
            panels.append(Panel(called(name), known, ()))
    says = "What every term adds to the loss, the runs over one another. Each panel has a scale of its own."
    unit, heading = "weight · value", "Contributions, term by term"
    left = [panel.title for panel in panels[MOST_SMALL:]]
    notes = (f"in the tables only: {listed(left)}.",) if left else ()
    kept = tuple(panels[:MOST_SMALL])
    return Chart("compared", heading, says, unit, Scale(), kept, True, notes) if kept else None


def timings(runs: Sequence[Run]) -> Chart | None:
    """What takes the time, where the loop logged it."""
    names = dict.fromkeys(name for run in runs for name in run.names if name.startswith("timings/"))
    hosted = [name for name in terms_of(runs) if any(r.has(f"reg/{name}/host_seconds") for r in runs)]
    labels = {name: name.partition("/")[2] for name in names}
    labels |= {f"reg/{name}/host_seconds": f"{name} (host)" for name in hosted}
    panels = []
    for run in runs:
        lines = [
            Line(label, run.steps, run.series(name), index)
            for index, (name, label) in enumerate(labels.items())
            if name in run.names
        ]
        panels.append(Panel(run.name if len(runs) > 1 else "", tuple(lines), (run,)))
    says = "Seconds a step, as far as they were logged."
    return lines_chart("timings", "Timings", says, "seconds", logarithmic, panels)


def terms_of(runs: Sequence[Run]) -> list[str]:
    """The terms of all runs, in the order in which they came up: a term's look is its place there."""
    return list(dict.fromkeys(name for run in runs for name in run.terms))


def _by_run(
    runs: Sequence[Run],
    name: str,
    heading: str,
    says: str,
    unit: str,
    key: str,
    choose: Choice,
    *,
    base: bool = True,
) -> Chart | None:
    """A panel a run, a line a term."""
    terms, panels = terms_of(runs), []
    for run in runs:
        drawn = [term for term in ((BASE, *terms) if base else terms) if term == BASE or term in run.terms]
        lines = [Line(called(t), run.steps, run.of(t, key), _index(terms, t)) for t in drawn]
        if key == "grad_norm_weighted" and "grad_norm/total" in run.names:
            lines.append(Line(TOTAL, run.steps, run.series("grad_norm/total"), style.TOTAL))
        panels.append(Panel(run.name if len(runs) > 1 else "", tuple(lines), (run,)))
    return lines_chart(name, heading, says, unit, choose, panels)


def _largest(terms: Sequence[str], known: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """The terms with an area of their own, in order."""
    if len(terms) <= AREAS + 1:
        return list(terms)
    size = {name: sum(float(np.nansum(part[name])) for part in known if name in part) for name in terms}
    kept = sorted(terms, key=lambda name: -size[name])[:AREAS]
    return [name for name in terms if name in kept]


def _index(terms: Sequence[str], name: str) -> int:
    return style.INK if name == BASE else terms.index(name)
