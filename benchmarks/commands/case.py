"""One case: check every contestant against float64, let them take turns, and make the table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

from benchmarks.cases import PROBLEMS
from benchmarks.cases.problem import to_flat
from benchmarks.contestants.combining import combining
from benchmarks.contestants.in_jax import contestants
from benchmarks.contestants.torch_worker import Worker
from benchmarks.measure.answers import TOLERANCE, UPGRAD_TOLERANCE, Answer, tolerance, worst_error
from benchmarks.measure.reference import reference
from benchmarks.measure.table import markdown
from benchmarks.measure.timing import Turn, take_turns

SECONDS, FEWEST_ROUNDS, QUICK_ROUNDS = 120.0, 5, 3
NO_TORCH = "not run: this Python cannot import torch; name one that can with --torch-python PYTHON"
LEGEND = (
    f"Every contestant's values, norms and gradient agree with float64 to {TOLERANCE:g}, UPGrad's "
    f"directions to {UPGRAD_TOLERANCE:g}. Temp memory "
    "is XLA's, the most that one of its programs takes beside arguments and results."
)


def run_case(
    case: str, torch_python: str | None, quick: bool, upgrad: bool = False
) -> tuple[str, dict[str, str]]:
    """The case's section in Markdown, and the versions that the PyTorch worker reports.

    ``upgrad``: the contestants combine the terms' gradients by UPGrad, in place of the plain sum and norms.
    """
    problem = PROBLEMS[case]()
    ours = (combining if upgrad else contestants)(problem)
    memory = {c.name: c.temp_memory() for c in ours}
    here: dict[str, Turn] = {c.name: c.turn for c in ours}
    there: dict[str, Turn] = {}
    answers: dict[str, Callable[[], Answer]] = {c.name: c.answer for c in ours}
    skipped, versions, processes = {"PyTorch, TorchJD": NO_TORCH}, {}, [os.getpid()]
    with contextlib.ExitStack() as stack:
        if torch_python:
            worker = stack.enter_context(Worker(torch_python, case, to_flat(problem), upgrad))
            skipped, versions = worker.skipped, worker.versions
            processes.append(worker.process)
            there = {name: partial(worker.run, name) for name in worker.names}
            answers |= {name: partial(worker.answer, name) for name in worker.names}
        notes = _faults(answers, reference(case)) | skipped
        groups = [
            {name: turn for name, turn in group.items() if name not in notes}
            for group in (here, there)
            if group
        ]
        take_turns(groups, processes, budget=0, fewest=1, retries=0)  # Everything is warm from here on.
        budget, fewest = (0.0, QUICK_ROUNDS) if quick else (SECONDS, FEWEST_ROUNDS)
        timings = take_turns(groups, processes, budget=budget, fewest=fewest)
    medians = {name: median(seconds) for name, seconds in timings.seconds.items()}
    base = medians.get(ours[0].name)
    rows = [
        _row(name, medians.get(name), base, memory.get(name), notes.get(name, ""))
        for name in [*answers, *skipped]
    ]
    table = markdown(["", "median ms", "× hand-written", "temp memory MiB"], rows)
    title = f"{problem.title.partition(', norms')[0]}, combined by UPGrad" if upgrad else problem.title
    return f"## {title}\n\n{table}\n\n{timings} {LEGEND}\n", versions


def _faults(answers: Mapping[str, Callable[[], Answer]], right: Answer) -> dict[str, str]:
    """What is wrong with those contestants that are wrong, by name."""
    faults = {}
    for name, answer in answers.items():
        try:
            error, where = worst_error(answer(), right)
        except RuntimeError as raised:
            faults[name] = f"does not run: {raised}"
            continue
        if error > tolerance(where):
            faults[name] = f"WRONG: {where} off by {error:.1e}"
    return faults


def _row(name: str, seconds: float | None, base: float | None, memory: int | None, note: str) -> list[str]:
    mebibytes = "" if memory is None else f"{memory / 2**20:.1f}"
    if seconds is None:
        return [name, note, "", mebibytes]
    ratio = f"{seconds / base:.2f}" if base else "no base"
    return [name, _three_digits(1e3 * seconds), ratio, mebibytes]


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
