"""Cases "host" and "telemetry": what terms outside XLA, and being told of a step, cost a step."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr
from benchmarks.measure.table import markdown
from jaxreg.host.calls import HostCalls

WAIT = 0.1  # seconds of I/O of a host term
FORWARD = 0.15  # seconds of the remote forward that is overlapped
Step = Callable[[], object]


class Remote:
    """A client whose forward takes a while, and whose answer is −1 everywhere."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(2)

    def forward(self, data: Sequence[Any], loss_fn: str) -> Future[Any]:
        return self._pool.submit(self._answer, data, self._seconds)

    def forward_backward(self, data: Sequence[Any], loss_fn: str) -> Future[Any]:
        return self._pool.submit(self._answer, data, 0.0)

    @staticmethod
    def _answer(data: Sequence[Any], seconds: float) -> Any:
        time.sleep(seconds)
        outputs = [{"logprobs": -np.ones(len(d.loss_fn_inputs["target_tokens"]), np.float32)} for d in data]
        return type("Reply", (), {"loss_fn_outputs": outputs, "metrics": {}})()


def make_data() -> list[jr.client.Datum]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 120, 8)
    return [jr.client.Datum(np.arange(n), {"target_tokens": rng.integers(0, 100, n)}) for n in lengths]


async def coroutine(data: Any, logprobs: Any) -> float:
    await asyncio.sleep(WAIT)
    return 1.0


def blocking(data: Any, logprobs: Any) -> float:
    time.sleep(WAIT)
    return 1.0


async def early_coroutine(data: Any) -> float:
    await asyncio.sleep(WAIT)
    return 1.0


def early_blocking(data: Any) -> float:
    time.sleep(WAIT)
    return 1.0


def grind(data: Any, loops: int = 9_000_000) -> float:
    """Python's own arithmetic: one core, and its lock."""
    total = 0
    for i in range(loops):
        total = (total * 31 + i) % 1_000_003
    return float(total)


@contextlib.contextmanager
def terms(fns: Sequence[Callable[..., Any]], **settings: Any) -> Iterator[list[jr.host.HostRegularizer]]:
    made = [jr.host.HostRegularizer(f"term_{i}", fn, 0.1, **settings) for i, fn in enumerate(fns)]
    try:
        yield made
    finally:
        for term in made:
            term.close()


def rounds(steps: dict[str, Step], number: int) -> dict[str, float]:
    """The median seconds of each, taking turns."""
    for step in steps.values():
        step()  # everything is compiled and started from here on
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(number):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def io_table(number: int) -> str:
    """Five terms of 100 ms of I/O, against the same step without them."""
    data = make_data()
    rows = []
    for seconds, fns in (
        (0.0, {"`async def`": coroutine, "threads": blocking}),
        (FORWARD, {"`async def`, data alone": early_coroutine, "threads, data alone": early_blocking}),
    ):
        client = Remote(seconds)
        plain = jr.compose(jr.losses.CrossEntropy(), track_grad_norms=True)
        for name, fn in fns.items():
            with terms([fn] * 5) as five:
                whole = jr.compose(jr.losses.CrossEntropy(), five, track_grad_norms=True)
                times = rounds(
                    {"plain": _step(client, data, plain), "host": _step(client, data, whole)}, number
                )
            ms = {key: 1e3 * value for key, value in times.items()}
            rows.append(
                [
                    f"five, {name}",
                    f"{1e3 * seconds:.0f}",
                    f"{ms['plain']:.1f}",
                    f"{ms['host']:.1f}",
                    f"{ms['host'] - ms['plain']:.1f}",
                ]
            )
    header = ["host terms of 100 ms", "remote forward ms", "step without ms", "step with ms", "added ms"]
    return markdown(header, rows)


def _step(client: Remote, data: list[jr.client.Datum], objective: jr.CompositeLoss) -> Step:
    def step() -> float:
        out = jr.client.forward_backward_custom(client, data, objective).output
        values = [float(term.value) for term in out.regularizers.values()]
        if any(value != 1.0 for value in values):
            raise SystemExit(f"wrong values: {values}")
        return float(out.loss_total)

    return step


def cpu_table(number: int) -> str:
    """Two terms that compute, in two processes at once, against the same two one after the other.

    The same processes do both: CPython's speed differs by a tenth from one process to the next. A bare pool
    of processes shows what two cores give at best.
    """
    expected = grind(None)
    spawn = multiprocessing.get_context("spawn")
    with terms([grind] * 2, run="process") as two, ProcessPoolExecutor(2, mp_context=spawn) as pool:

        def ask(some: Sequence[jr.host.HostRegularizer]) -> None:
            calls = HostCalls(some, [])
            calls.start(None)
            if any(result.value != expected for result in calls.collect().values()):
                raise SystemExit("wrong values")

        def together() -> None:
            ask(two)

        def one_by_one() -> None:
            for term in two:
                ask([term])

        def bare() -> None:
            list(pool.map(grind, [None] * 2))

        times = rounds(
            {"one after the other": one_by_one, "at once": together, "a bare pool, at once": bare}, number
        )
    serial = times["one after the other"]
    rows = [[name, f"{1e3 * value:.0f}", f"{serial / value:.2f}"] for name, value in times.items()]
    return markdown(["two terms that compute", "ms", "times faster"], rows)


def telemetry_table(number: int) -> str:
    """Twenty terms: the cost of telling a step, beside computing it, attached and not."""
    objective = jr.compose(
        lambda x, batch: jnp.mean(x**2),
        [{"name": f"term_{i}", "fn": _power(1 + i / 10), "weight": 0.1} for i in range(20)],
        track_grad_norms=True,
    )
    x = jnp.ones((64, 128))

    def ready() -> Any:
        (_, out), _ = objective.value_and_grad(x)
        return jax.block_until_ready(out)

    rows = []
    for name in ("detached", "JSONL", "JSONL, Warnings, FlightRecorder"):
        with tempfile.TemporaryDirectory() as folder, _attached(name, folder) as path:
            seconds = []
            for step in range(number):
                out = ready()
                inputs = jr.telemetry.Inputs(objective, x)
                began = time.perf_counter()
                jr.telemetry.log(out, step=step, inputs=inputs)
                seconds.append(time.perf_counter() - began)
            lines = [] if path is None else path.read_text().splitlines()
            if path is not None and sum('"event"' not in line for line in lines) != number:
                raise SystemExit("not every step is in the file")
        rows.append([name, f"{1e6 * median(seconds):.1f}"])
    return markdown(["handlers", "µs a step"], rows)


@contextlib.contextmanager
def _attached(name: str, folder: str) -> Iterator[Path | None]:
    from jaxreg.telemetry import JSONL, FlightRecorder, Warnings

    if name == "detached":
        yield None
        return
    path = Path(folder) / "run.jsonl"
    more: list[Any] = []
    if "Warnings" in name:
        more = [Warnings(), FlightRecorder(os.path.join(folder, "flight"))]
    with jr.telemetry.attached(JSONL(path), *more):
        yield path


def _power(exponent: float) -> Callable[..., Any]:
    return lambda x, batch: jnp.mean(jnp.abs(x) ** exponent)


def host_tables(quick: bool) -> str:
    """Everything, in Markdown."""
    number = 5 if quick else 30
    return "\n\n".join([io_table(number), cpu_table(max(3, number // 3)), telemetry_table(50 * number)])
