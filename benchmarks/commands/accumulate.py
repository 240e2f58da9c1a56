"""What `jaxreg.accumulate` takes in memory and time, beside its micro-batches one by one."""

from __future__ import annotations

import os
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr
from benchmarks.cases import params, transformer
from benchmarks.measure.table import markdown
from benchmarks.measure.timing import Timings, take_turns, timed_turn

STEPS = 8
ROUNDS, QUICK_ROUNDS = 10, 2
TOLERANCE = 1e-5  # of the gradients, relative to their largest entry
NORMS: dict[str, bool | jr.GradNorms] = {
    "norms off": False,
    "norms at the outputs": jr.GradNorms(wrt="outputs"),
    "norms in parameter space": jr.GradNorms(wrt="params"),
}


def accumulate_tables(quick: bool) -> str:
    """Memory and time, in Markdown."""
    whole, x = _batch(), jax.tree.map(jnp.asarray, params.problem().x)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    measured = [_row(name, norms, whole, x, rounds) for name, norms in NORMS.items()]
    rows, notes = [row for row, _ in measured], [f"{row[0]}: {timings}" for row, timings in measured]
    title = (
        f"Six terms on the transformer, {whole.shape[0]} × {whole.shape[1]} tokens in {STEPS} micro-batches, "
        f"which are ragged; the gradient has {_mebibytes(x):.1f} MiB."
    )
    header = [
        "",
        "micro-batch, temp MiB",
        "accumulate, temp MiB",
        "× (micro-batch + gradient)",
        f"{STEPS} micro-batches, ms",
        "accumulate, ms",
        "×",
    ]
    return f"## accumulate(steps={STEPS})\n\n{title}\n\n{markdown(header, rows)}\n\n" + "\n".join(notes)


def _batch() -> jr.TokenBatch:
    """Eight times the benchmark's batch, of rows that are not as long as one another."""
    rng = np.random.default_rng(0)
    shape = (STEPS * params.BATCH, transformer.LENGTH)
    words = transformer.VOCABULARY
    return jr.TokenBatch.from_arrays(
        mask=np.arange(shape[1]) < rng.integers(shape[1] // 2, shape[1] + 1, shape[0])[:, None],
        tokens=rng.integers(words, size=shape).astype(np.int32),
        target_tokens=rng.integers(words, size=shape).astype(np.int32),
        ref_logprobs=rng.normal(size=(*shape, words)).astype(np.float32),
    )


def _objective(norms: bool | jr.GradNorms) -> jr.CompositeLoss:
    terms: dict[str, Any] = {
        "entropy": jr.regularizers.Entropy(),
        "kl": jr.regularizers.KL(),
        "z_loss": jr.regularizers.ZLoss(),
        "l1": jr.regularizers.L1(),
        "l2": jr.regularizers.L2(),
    }
    weights = dict(zip(terms, params.WEIGHTS[1:], strict=True))
    specs = [jr.RegularizerSpec(name=name, fn=fn, weight=weights[name]) for name, fn in terms.items()]
    base = jr.losses.CrossEntropy(inputs="logits")
    return jr.compose(base, specs, forward=params.forward, track_grad_norms=norms)


def _row(
    name: str, norms: bool | jr.GradNorms, whole: jr.TokenBatch, x: Any, rounds: int
) -> tuple[list[str], Timings]:
    objective, parts = _objective(norms), whole.split(STEPS)
    micro: Any = jax.jit(lambda o, x, part: o.value_and_grad(x, part)).lower(objective, x, parts[0]).compile()
    every: Any = (
        jax.jit(lambda o, x, batch: jr.accumulate(o, x, batch, steps=STEPS))
        .lower(objective, x, whole)
        .compile()
    )
    _check(micro, every, objective, x, parts, whole)

    def one_by_one() -> None:
        for part in parts:
            jax.block_until_ready(micro(objective, x, part))

    def at_once() -> None:
        jax.block_until_ready(every(objective, x, whole))

    turns = {"micro": lambda: timed_turn(one_by_one), "every": lambda: timed_turn(at_once)}
    timings = take_turns([turns], [os.getpid()], budget=0, fewest=rounds)
    seconds = {turn: median(own) for turn, own in timings.seconds.items()}
    temp = {"micro": _temporary(micro), "every": _temporary(every)}
    row = [
        name,
        f"{temp['micro']:.1f}",
        f"{temp['every']:.1f}",
        f"{temp['every'] / (temp['micro'] + _mebibytes(x)):.3f}",
        f"{1e3 * seconds['micro']:.0f}",
        f"{1e3 * seconds['every']:.0f}",
        f"{seconds['every'] / seconds['micro']:.3f}",
    ]
    return row, timings


def _check(micro: Any, every: Any, objective: Any, x: Any, parts: list[Any], whole: Any) -> None:
    """The same gradient, before anything is timed."""
    total = None
    for part in parts:
        _, gradient = micro(objective, x, part)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    _, gradient = every(objective, x, whole)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(total), strict=True):
        gap = float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))
        if gap > TOLERANCE:
            raise SystemExit(f"the accumulated gradient is off by {gap:.1e}")


def _temporary(compiled: Any) -> float:
    return float(compiled.memory_analysis().temp_size_in_bytes) / 2**20


def _mebibytes(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20
