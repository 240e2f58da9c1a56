"""A report's tables: every term in numbers, and how runs differ where both have been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxreg.core.spec import BASE, TOTAL
from jaxreg.watching import style
from jaxreg.watching.gallery import NORM, WEIGHTED_NORM, terms_of
from jaxreg.watching.live import color_name
from jaxreg.watching.run import Run
from jaxreg.watching.style import DASHES, LIGHT, Style
from jaxreg.watching.summary import Ends, Facts, ending, meeting, summary
from jaxreg.watching.words import called, escaped, number, percent

Named = Callable[[str], str]  # a term's name as HTML, beside its line


def summaries(runs: Sequence[Run]) -> list[str]:
    """A section a run."""
    named = _names(runs)
    return [_summary(run, summary(run), named, len(runs) > 1) for run in runs]


def differences(runs: Sequence[Run]) -> list[str]:
    """A section for every run but the first, against it."""
    named = _names(runs)
    return [_difference(runs[0], other, terms_of(runs), named) for other in runs[1:]]


def last_steps(run: Run) -> str:
    """What the last tenth of a run's steps is called."""
    count = len(ending(run.steps))
    return f"mean of last {count:,}" if count > 1 else "mean of last step"


def _summary(run: Run, facts: Sequence[Facts], named: Named, several: bool) -> str:
    heads = (
        "term", "last", last_steps(run), "min", "max", "weight", "value", NORM, WEIGHTED_NORM, "grad share",
        "not finite",
    )  # fmt: skip
    rows = []
    for f in facts:
        there = "" if f.steps == len(run.steps) else f' <small class="part">in {f.steps:,} steps</small>'
        rows.append(
            [
                named(f.name) + there,
                *map(
                    number, (f.last, f.end, f.least, f.greatest, f.weight, f.value, f.norm, f.weighted_norm)
                ),
                percent(f.share),
                f'<span class="bad">{f.nonfinite:,}</span>' if f.nonfinite else "0",
            ]
        )
    heading = "Summary" + (f": {escaped(run.name)}" if several else "")
    says = "Of each term's contribution, its weight times its value: in the last step that has it, the mean "
    says += (
        f"over the last {len(ending(run.steps)):,} of {len(run.steps):,} steps, its least and its greatest. "
    )
    says += "Weight, value and norms are those of the last step; the share of the gradient is the mean."
    return section(heading, says, table(heads, rows))


def _difference(first: Run, other: Run, terms: Sequence[str], named: Named) -> str:
    """How two runs differ over the last steps that both have."""
    window = meeting(first, other)
    sides = [Ends(run, window) for run in (first, other)]
    a, b = escaped(first.name), escaped(other.name)
    rows = []
    for name in (BASE, *terms, TOTAL):
        there = [name in (BASE, TOTAL) or name in run.terms for run in (first, other)]
        if not any(there):
            continue
        cell = named(name)
        if not all(there):
            cell += f' <small class="part">only in {a if there[0] else b}</small>'
        was, now = (side.contribution(name) for side in sides)
        change = now - was
        sign = "+" if change > 0 else ""
        relative = sign + percent(change / abs(was)) if was else "–"
        shares = [percent(side.share(name)) for side in sides]
        rows.append([cell, number(was), number(now), sign + number(change), relative, *shares])
    heads = ("term", a, b, "difference", "relative", f"grad share, {a}", f"grad share, {b}")
    says = _compared(first, other, window)
    return section(f"Differences: {b} against {a}", says, table(heads, rows))


def _compared(first: Run, other: Run, window: tuple[int, int] | None) -> str:
    """Over which steps runs are compared, and why."""
    if window is None:
        return (
            "Means of the contributions over the last 10 % of each run. "
            '<strong class="part">The runs have no step in common: each is taken at its own end.</strong>'
        )
    low, high = window
    says = f"Means of the contributions over the steps {low:,} to {high:,}, "
    says += "the last tenth of those that both have."
    ends = [int(run.steps[-1]) for run in (first, other)]
    if ends[0] != ends[1]:
        longer = (first, other)[ends[1] > ends[0]]
        says += (
            f' <strong class="part">{escaped(longer.name)} goes on to step {max(ends):,}, which is left out '
            "here.</strong>"
        )
    return says


def _names(runs: Sequence[Run]) -> Named:
    terms = terms_of(runs)

    def named(name: str) -> str:
        if name == TOTAL:
            return swatch(style.TOTAL) + "total"
        return swatch(style.INK if name == BASE else terms.index(name)) + escaped(called(name))

    return named


def swatch(index: int) -> str:
    """The line that a term is drawn with."""
    dash = " ".join(f"{part:g}" for part in DASHES[Style.of(index, LIGHT).dash])
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="{color_name(index)}" d="M0 4h26"{dashed}/></svg>'
    )


def section(heading: str, says: str, inside: str) -> str:
    """A part of the page. Heading, sentence and inside are HTML already."""
    return f'<section>\n<h2>{heading}</h2>\n<p class="says">{says}</p>\n{inside}\n</section>'


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
