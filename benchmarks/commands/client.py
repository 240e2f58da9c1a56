"""Case "client": both sides take turns; their gradients, values and norms are checked in float64 first."""

from __future__ import annotations

import os
from functools import partial
from statistics import median

from benchmarks.cases.client import Step, draw
from benchmarks.contestants.torch_worker import Worker
from benchmarks.measure.answers import TOLERANCE, tolerance, worst_error
from benchmarks.measure.table import markdown
from benchmarks.measure.timing import take_turns, timed_turn

OURS, REFERENCE = "jaxreg", "float64"


def run_client(torch_python: str, quick: bool) -> tuple[str, dict[str, str]]:
    """The section in Markdown, and the versions that the PyTorch worker reports."""
    arrays = draw()
    ours = Step(arrays)
    with Worker(torch_python, "client", arrays) as worker:
        names = [name for name in worker.names if name != REFERENCE]
        right = worker.answer(REFERENCE)
        for name, answer in {OURS: ours.answer(), **{n: worker.answer(n) for n in names}}.items():
            error, where = worst_error(answer, {k: v for k, v in right.items() if k in answer})
            if error > tolerance(where):
                raise SystemExit(f"{name} is wrong: {where} off by {error:.1e}")
        here = {OURS: partial(timed_turn, ours)}
        there = {name: partial(worker.run, name) for name in names}
        processes = [os.getpid(), worker.process]
        take_turns(
            [here, there], processes, budget=0, fewest=1, retries=0
        )  # Everything is warm from here on.
        timings = take_turns([here, there], processes, budget=0 if quick else 30, fewest=3)
        versions = worker.versions
    medians = {name: median(seconds) for name, seconds in timings.seconds.items()}
    rows = [[n, f"{1e3 * s:.3g}", f"{s / medians[OURS]:.1f}"] for n, s in medians.items()]
    title = "The client's own work a step: 64 ragged datums of 200 to 1,024 tokens, six terms"
    legend = f"Values, norms and gradients agree with float64 to {TOLERANCE:g}."
    return f"## {title}\n\n{markdown(['', 'median ms', '× jaxreg'], rows)}\n\n{timings} {legend}\n", versions
