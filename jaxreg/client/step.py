"""A step with a remote model: read and pack → forward → evaluate → linearize → send → finish.

`take_step` is that line, written once for programs that block and for event loops: it says ``await`` where it
computes for long or waits for the server. What it returns finishes, when the reply to the last request is in.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from jaxreg.client import wire
from jaxreg.client.ask import Ask, Options, check
from jaxreg.client.evaluate import evaluate
from jaxreg.client.finish import CustomFuture, Sent
from jaxreg.client.pack import Packed, given, pack
from jaxreg.client.requests import LOSS, submit
from jaxreg.client.several import as_one
from jaxreg.client.telling import Telling
from jaxreg.client.work import Evaluated, prepare, reweighted_by


async def take_step(
    ask: Ask, options: Options, run: Callable[..., Awaitable[Any]], reply: Callable[..., Awaitable[Any]]
) -> CustomFuture:
    """Everything up to where the backward request is handed over, checked as early as it can be.

    ``await run(function, *arguments)`` calls; ``await reply(future, timeout, step, applied)`` waits.
    """
    with Telling(ask.step) as told, Gate() as gate:
        check(ask.client, options)
        packed = await run(
            pack,
            ask.data,
            unrolled=options.top_k == "unrolled",
            totals_of=ask.totals_of,
            reweighted=reweighted_by(ask.objective),
        )
        logprobs = None if ask.logprobs is None else await run(given, ask.logprobs, packed)
        work = await run(prepare, ask.objective, packed, ask.state, ask.key, ask.step)
        told.begin(work)
        work.calls.start(packed.data)  # host terms that read the data alone run while the server does
        if logprobs is None:
            future = await run(forward, ask.client, packed, options.requests)
            answer = await reply(future, options.timeout, "forward", "no")
            logprobs = packed.logprobs_of(answer, "forward", "no")
        evaluated = await run(evaluate, work, logprobs, told)
        datums = await run(linearize, packed, evaluated)
        future = await run(send, ask.client, packed.grouped(datums, options.requests), gate)
        await run(told.stop, evaluated.output)
    return CustomFuture(Sent(packed, logprobs, evaluated.output, future, options, ask.step))


def forward(client: Any, packed: Packed, requests: int = 1) -> Any:
    """Ask for the logprobs; the client's future of the reply."""
    datums = packed.with_weights([wire.own_weights(row) for row in packed.rows])
    groups = packed.grouped(datums, requests)
    return as_one([submit(client.forward, (group, LOSS), "forward", "no") for group in groups])


def linearize(packed: Packed, evaluated: Evaluated) -> list[Any]:
    """The datums whose cross-entropy has the objective's gradient: weights = −d(loss)/d(logprobs)."""
    return packed.with_weights([-gradient for gradient in evaluated.gradients])


def send(client: Any, groups: Sequence[Sequence[Any]], gate: Gate) -> Any:
    """Hand the gradient over, one request a group of datums; the client's future of the reply."""
    gate.take()
    futures: list[Any] = []
    for group in groups:
        try:
            futures.append(submit(client.forward_backward, (group, LOSS), "backward", "maybe"))
        except Exception as error:
            if futures:
                error.add_note(
                    f"Of {len(groups)} requests {len(futures)} had been handed over, and their part of the "
                    f"gradient may be applied: load a saved state before the next optim_step."
                )
            raise
    return as_one(futures)


class Gate:
    """Who comes first: the thread that hands the backward over, or who cancels the step. Neither waits.

    As a context, an error closes it; a cancellation that came second says so.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()  # once, and never given back

    def take(self) -> None:
        """Hand over from now on; CancelledError where the step has ended."""
        if not self._taken.acquire(blocking=False):
            raise concurrent.futures.CancelledError

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        late = error is not None and not self._taken.acquire(blocking=False)
        if late and isinstance(error, asyncio.CancelledError):
            error.add_note("The backward request was being handed over: its gradient may be applied.")
