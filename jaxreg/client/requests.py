"""Ask a client, wait for what it answers, and say in one way what went wrong."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable
from typing import Any

from jaxreg.client.errors import Applied, RequestFailed, RequestTimedOut, Step

LOSS = "cross_entropy"
_TIMEOUTS = (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError)


def submit(method: Callable[..., Any], arguments: tuple[Any, ...], step: Step, applied: Applied) -> Any:
    """Hand a request over; ``applied`` is what becomes of the gradient if that fails.

    A backward that fails here may have been applied all the same: a client that answers at once may have
    failed at reading the answer.
    """
    try:
        future = method(*arguments)
    except _TIMEOUTS as error:
        raise _timed_out(step, applied, None) from error
    except Exception as error:
        raise _failed(error, step, applied) from error
    if inspect.iscoroutine(future):
        future.close()  # Nothing of it has run.
        raise TypeError(
            f"client: {getattr(method, '__name__', 'it')} is a coroutine function, which runs when it is "
            f"awaited and so keeps no order; a client's methods return futures at once"
        )
    return future


def wait(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    """The reply to a request, or the `RemoteError` that says what became of it."""
    if not callable(getattr(future, "result", None)):
        return future  # a client that answers at once
    try:
        return future.result() if timeout is None else future.result(timeout)
    except _TIMEOUTS as error:
        raise _timed_out(step, applied, timeout) from error
    except Exception as error:
        raise _failed(error, step, applied) from error


async def arrival(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    """`wait`, for event loops. Who gives up waiting does not take the request back."""
    inner = future.future() if callable(getattr(future, "future", None)) else future  # the SDK's wrapper
    try:
        if isinstance(inner, concurrent.futures.Future):
            async with asyncio.timeout(timeout):
                # Not a task: a loop that ends cancels its tasks, and they what they wait for.
                return await asyncio.shield(asyncio.wrap_future(inner))
        if inspect.isawaitable(future):
            async with asyncio.timeout(timeout):
                return await asyncio.shield(asyncio.ensure_future(future))
        if callable(getattr(future, "result", None)):
            arguments = () if timeout is None else (timeout,)  # so that the thread ends, too
            return await asyncio.to_thread(future.result, *arguments)
        return future  # a client that answers at once
    except _TIMEOUTS as error:
        raise _timed_out(step, applied, timeout) from error
    except Exception as error:
        raise _failed(error, step, applied) from error


def _timed_out(step: Step, applied: Applied, timeout: float | None) -> RequestTimedOut:
    within = "" if timeout is None else f" within {timeout:g} s"
    return RequestTimedOut(f"no answer{within}", step=step, gradient_applied=applied)


def _failed(error: BaseException, step: Step, applied: Applied) -> RequestFailed:
    status = getattr(error, "status_code", None)
    what = f"{type(error).__name__}{'' if status is None else f' (status {status})'}: {error}"
    return RequestFailed(what, step=step, gradient_applied=applied)
