"""Compile time of an objective with 32 terms against the same sum written by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import jaxreg as jr
from benchmarks.cases.problem import Batch, Problem, Term
from benchmarks.contestants.in_jax import plain_step
from benchmarks.measure.table import markdown

COUNT, REPEATS, LIMIT = 32, 5, 3.0
SHAPES: tuple[Callable[[jax.Array], jax.Array], ...] = (
    jnp.abs,
    jnp.square,
    jnp.tanh,
    jnp.exp,
    jnp.sin,
    jax.nn.softplus,
    jax.nn.sigmoid,
    jnp.arctan,
)


def compile_table() -> str:
    """The table, in Markdown: programs in turns, caches cleared before each."""
    problem = _problem()
    arguments = (problem.x, problem.batch)
    step = jr.CompositeLoss.value_and_grad
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hand-written": (plain_step(problem), arguments),
        "jaxreg, norms off": (step, (problem.objective(False), *arguments)),
        "jaxreg, norms on": (step, (problem.objective(True), *arguments)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(REPEATS + 1):
        for name, program in programs.items():
            seconds[name].append(_seconds(*program))
    medians = {name: median(times[1:]) for name, times in seconds.items()}  # The first warms up.
    base = medians["hand-written"]
    rows = [
        [name, f"{s:.2f}", f"{s / base:.2f}", "yes" if s <= LIMIT * base else "NO"]
        for name, s in medians.items()
    ]
    return markdown([f"{COUNT} terms", "median s", "×", f"at most {LIMIT:g}×"], rows)


def _seconds(fn: Any, arguments: tuple[Any, ...]) -> float:
    """Seconds to trace, lower and compile."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(fn).lower(*arguments).compile()
    return time.perf_counter() - start


def _problem() -> Problem:
    terms = {f"term_{i}": _term(i) for i in range(COUNT)}
    x = jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)
    batch = {"mask": jnp.ones(x.shape)}
    weights = (1.0, *(0.01 * i for i in range(1, COUNT)))
    return Problem(f"{COUNT} terms", terms, weights, x, batch)


def _term(i: int) -> Term:
    def term(x: jax.Array, batch: Batch) -> jax.Array:
        values = SHAPES[i % len(SHAPES)](x * (1 + i / COUNT))
        return jnp.sum(batch["mask"] * values) / jnp.sum(batch["mask"])

    return term
