"""What norms now and then cost over a run, and what rules that move the weights cost a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr
from benchmarks.cases import params
from benchmarks.cases.problem import Problem
from benchmarks.measure.table import markdown
from benchmarks.measure.timing import take_turns, timed_turn

EVERY = 10
RULES = 20
ROUNDS, QUICK_ROUNDS = 10, 2
TOLERANCE = 1e-5  # of the gradients, relative to their largest entry


def moving_tables(quick: bool) -> str:
    """Both tables, in Markdown."""
    problem = params.problem()
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return "\n\n".join([_now_and_then(problem, rounds), _rules(problem, rounds)])


def _now_and_then(problem: Problem, rounds: int) -> str:
    """A turn is a whole period of ten steps, so that it holds one measurement."""
    now_and_then = jr.GradNorms(wrt="params", every=EVERY)
    runs = {
        "jaxreg, norms off": Run(problem.objective(False), problem),
        'GradNorms(wrt="params")': Run(problem.objective(jr.GradNorms(wrt="params")), problem),
        f'GradNorms(wrt="params", every={EVERY})': Run(problem.objective(now_and_then), problem),
    }
    table = _table(runs, rounds, EVERY)
    return f"## Norms in parameter space every {EVERY}th step\n\nSix terms on the transformer; {table}"


def _rules(problem: Problem, rounds: int) -> str:
    """Twenty terms, each with a rule of its own, beside the same twenty with fixed weights."""
    kinds = [*problem.terms.items()][1:]
    names = [f"{kinds[i % len(kinds)][0]}_{i}" for i in range(RULES)]
    terms = [kinds[i % len(kinds)][1] for i in range(RULES)]
    base = problem.terms["cross_entropy"]
    specs = [jr.RegularizerSpec(name=name, fn=fn, weight=1e-3) for name, fn in zip(names, terms, strict=True)]
    makers: list[Callable[[str], jr.weighting.Rule]] = [
        lambda name: jr.weighting.gradient_share(name, share=0.02),
        lambda name: jr.weighting.adaptive_kl(name, target=0.05),
        lambda name: jr.weighting.dual_ascent(name, bound=0.1),
        lambda name: jr.weighting.geco(name, bound=0.1),
    ]
    rule = jr.weighting.chain(*(makers[i % len(makers)](name) for i, name in enumerate(names)))
    norms = jr.GradNorms(wrt="outputs")

    def composed(**options: Any) -> jr.CompositeLoss:
        return jr.compose(base, specs, forward=problem.forward, track_grad_norms=norms, **options)

    runs = {
        "fixed weights": Run(composed(), problem),
        f"{RULES} rules": Run(composed(weighting=rule), problem),
    }
    table = _table(runs, rounds, 3)
    return f"## {RULES} rules on {RULES} terms\n\nThe transformer, norms at the outputs; {table}"


class Run:
    """Steps of an objective whose state goes on from turn to turn; the parameters stay."""

    def __init__(self, objective: jr.CompositeLoss, problem: Problem) -> None:
        self._objective = objective
        self._x = jax.tree.map(jnp.asarray, problem.x)
        self._batch = jax.tree.map(jnp.asarray, problem.batch)
        self._state = objective.init()

        def step(objective: jr.CompositeLoss, x: Any, batch: Any, state: Any) -> tuple[Any, Any]:
            (_, out), gradient = objective.value_and_grad(x, batch, state=state)
            return gradient, out  # all of it, or the compiler would leave out what nobody reads

        self._step: Any = jax.jit(step)

    def steps(self, count: int) -> Any:
        """So many steps, each waited for; the last one's gradient."""
        for _ in range(count):
            gradient, out = jax.block_until_ready(
                self._step(self._objective, self._x, self._batch, self._state)
            )
            self._state = out.state
        return gradient

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return int(self._step._cache_size())

    def turn(self, count: int) -> float:
        """Seconds of one step, on average over ``count``."""
        return timed_turn(lambda: self.steps(count)) / count


def _table(runs: Mapping[str, Run], rounds: int, period: int) -> str:
    """Checked equal first, where the weights are: before any rule has moved one."""
    first, *others = [run.steps(1) for run in runs.values()]
    for name, other in zip([*runs][1:], others, strict=True):
        if (gap := _gap(other, first)) > TOLERANCE:
            raise SystemExit(f"{name}: its gradient is off by {gap:.1e}")
    turns = {name: (lambda run=run: run.turn(period)) for name, run in runs.items()}
    for run in runs.values():
        run.steps(period - 1)  # from here on, a turn is a whole period
    timings = take_turns([turns], [os.getpid()], budget=0, fewest=rounds)
    medians = {name: median(seconds) for name, seconds in timings.seconds.items()}
    base = next(iter(medians.values()))
    rows = [
        [name, f"{1e3 * seconds:.1f}", f"{seconds / base:.3f}", str(runs[name].programs)]
        for name, seconds in medians.items()
    ]
    note = f"the median of {rounds} averages over {period} steps or more, whose state goes on."
    header = ["", "ms a step", "× the first", "compiled programs"]
    return f"{note}\n\n{markdown(header, rows)}\n\n{timings}"


def _gap(tree: Any, other: Any) -> float:
    gaps = jax.tree.map(
        lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(np.asarray(b))),
        tree,
        other,
    )
    return float(max(jax.tree.leaves(gaps)))
