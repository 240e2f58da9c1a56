"""Ten thousand steps that fail, hang and are cancelled: does anything leak, is every step told once?

Every step has three host terms (a coroutine, a thread, a process), each of which fails, hangs, returns
garbage or kills itself at random, and a client that fails at random; some steps are cancelled while they
run. Memory, threads, processes and file handles are counted along the way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import jaxreg as jr

SEED = 0
HANGS = 0.02  # seconds after which a call counts as hanging


@dataclasses.dataclass(frozen=True)
class Count:
    """What there is at a moment."""

    step: int
    memory: float  # MiB, of this process
    threads: int
    processes: int
    files: int


class Unreliable:
    """A remote client that sometimes fails."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def forward(self, data: Any, loss_fn: str) -> Future[Any]:
        return self._answer(data)

    def forward_backward(self, data: Any, loss_fn: str) -> Future[Any]:
        return self._answer(data)

    def _answer(self, data: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self._rng.random() < 0.02:
            future.set_exception(ConnectionError("gone"))
        else:
            outputs = [{"logprobs": -np.ones(d.loss_fn_inputs["target_tokens"].size)} for d in data]
            future.set_result(type("Reply", (), {"loss_fn_outputs": outputs, "metrics": {}})())
        return future


def misbehave(chance: float) -> Any:
    """Sometimes not what a host function should do; None otherwise."""
    if chance < 0.02:
        raise ValueError("no such fact")
    if chance < 0.04:
        return float("nan")
    if chance < 0.05:
        return "garbage"
    return None


async def coroutine(data: Any, logprobs: Any) -> Any:
    chance = random.random()
    if 0.05 < chance < 0.06:
        await asyncio.sleep(60)
    await asyncio.sleep(0)
    return misbehave(chance) or (1.0, {"n": len(data)}, [np.ones_like(lp) for lp in logprobs])


def blocking(data: Any) -> Any:
    chance = random.random()
    if 0.05 < chance < 0.06:
        time.sleep(3 * HANGS)
    return misbehave(chance) or 1.0


def elsewhere(data: Any, logprobs: Any) -> Any:
    chance = random.random()
    if chance > 0.9995:
        os._exit(3)
    if chance > 0.999:
        time.sleep(60)
    return misbehave(chance) or (2.0, {}, [0.5 * np.ones_like(lp) for lp in logprobs])


def soak(steps: int, folder: Path) -> tuple[list[Count], Counter[str]]:
    """What there was along the way, and how the steps ended; checks the log."""
    rng = random.Random(SEED)
    random.seed(SEED)
    client = Unreliable(rng)
    data = [
        jr.client.Datum(np.arange(n), {"target_tokens": np.arange(n) % 7, "weights": np.ones(n)})
        for n in (5, 9, 3, 7)
    ]
    path = folder / "run.jsonl"
    counts, ends = [], Counter[str]()
    own = [
        jr.host.HostRegularizer("coroutine", coroutine, 0.1, timeout=HANGS, on_error="last"),
        jr.host.HostRegularizer("blocking", blocking, 0.1, timeout=HANGS, on_error="skip"),
        jr.host.HostRegularizer("elsewhere", elsewhere, 0.1, run="process", timeout=0.5, on_error="skip"),
        jr.host.HostRegularizer("strict", blocking, 0.1, timeout=HANGS, on_error="raise"),
    ]
    kl = jr.RegularizerSpec(name="l1", fn=jr.regularizers.L1(), weight=0.1)
    objective = jr.compose(jr.losses.CrossEntropy(), [kl, *own], track_grad_norms=True)
    with jr.telemetry.attached(
        jr.telemetry.JSONL(path), jr.telemetry.Warnings(), jr.telemetry.FlightRecorder(folder / "flight")
    ):
        for step in range(steps):
            ends[asyncio.run(_step(client, data, objective, step, rng))] += 1
            if step % max(1, steps // 20) == 0 or step == steps - 1:
                counts.append(_count(step))
                print(f"{counts[-1]}  {dict(ends)}", flush=True)
    for term in own:
        term.close()
    time.sleep(1.0)  # what was abandoned ends by itself
    counts.append(_count(steps))
    _check_log(path, steps)
    return counts, ends


async def _step(client: Any, data: Any, objective: Any, step: int, rng: random.Random) -> str:
    """One step, cancelled now and then; how it ended."""
    task = asyncio.ensure_future(jr.client.forward_backward_custom_async(client, data, objective, step=step))
    if rng.random() < 0.03:
        await asyncio.sleep(rng.random() * 0.005)
        task.cancel()
    try:
        await (await task)
    except asyncio.CancelledError:
        return "cancelled"
    except (jr.client.RemoteError, jr.host.HostTermError) as error:
        return type(error).__name__
    return "done"


def _count(step: int) -> Count:
    gc.collect()
    process = psutil.Process()
    memory = process.memory_info().rss / 2**20
    # multiprocessing keeps one tracker of its own for as long as the interpreter runs.
    children = [c for c in process.children() if "resource_tracker" not in " ".join(c.cmdline())]
    return Count(step, round(memory, 1), threading.active_count(), len(children), process.num_fds())


def _check_log(path: Path, steps: int) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ends = Counter(
        record["step"] for record in records if record.get("event") in (None, "custom_loss.exception")
    )
    wrong = [step for step in range(steps) if ends[step] != 1]
    if wrong or len(ends) != steps:
        raise SystemExit(f"the log has these steps not once: {wrong[:5]}")
    print(f"the log has all {steps} steps, each once")


def run_soak(steps: int) -> None:
    """The command: print what there was along the way; an error if something grew."""
    logging.disable(logging.CRITICAL)  # thousands of failures are what this is about
    with tempfile.TemporaryDirectory() as folder:
        counts, ends = soak(steps, Path(folder))
    warm = counts[len(counts) // 4]
    last = counts[-1]
    print(f"{dict(ends)}\nafter a quarter: {warm}\nat the end:      {last}")
    grown = last.memory - warm.memory
    if last.threads > 1 or last.processes or last.files > warm.files or grown > 0.05 * warm.memory:
        raise SystemExit("something leaks")
