"""Ask a client, wait for what it answers, and say in one way what went wrong."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from jaxreg.client.errors import Applied, RequestFailed, RequestTimedOut, Step

T = TypeVar("T")
LOSS = "cross_entropy"


def submit(method: Callable[..., Any], arguments: tuple[Any, ...], step: Step, applied: Applied) -> Any:
    """Hand a request over; ``applied`` is what becomes of the gradient if that fails.

    A backward that fails here may have been applied all the same: a client that answers at once may have
    failed at reading the answer.
    """
    with _explained(step, applied, None):
        future = method(*arguments)
    if inspect.iscoroutine(future):
        future.close()  # Nothing of it has run.
        raise TypeError(
            f"client: {getattr(method, '__name__', 'it')} is a coroutine function, which runs when it is "
            f"awaited and so keeps no order; a client's methods return futures at once"
        )
    return future


def wait(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    """The reply to a request, or the `RemoteError` that says what became of it."""
    with _explained(step, applied, timeout):
        return waited(future, timeout)


def waited(future: Any, timeout: float | None) -> Any:
    """The reply to a request, or what it raises."""
    if not callable(getattr(future, "result", None)):
        return future  # a client that answers at once
    return future.result() if timeout is None else future.result(timeout)


async def arrival(future: Any, timeout: float | None, step: Step, applied: Applied) -> Any:
    """`wait`, for event loops. Who gives up waiting does not take the request back."""
    with _explained(step, applied, timeout):
        return await arrived(future, timeout)


async def arrived(future: Any, timeout: float | None) -> Any:
    """`waited`, for event loops."""
    inner = future.future() if callable(getattr(future, "future", None)) else future  # the SDK's wrapper
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


async def called(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What awaiting a function is where it blocks."""
    return function(*arguments, **options)


def at_once(steps: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine all of whose awaiting blocks, so that it hands control back nowhere."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it awaited something that does not block")


@contextlib.contextmanager
def _explained(step: Step, applied: Applied, timeout: float | None) -> Iterator[None]:
    """What a request raises is the cause of an error that says which it was, and what that means."""
    try:
        yield
    except TimeoutError as error:
        within = "" if timeout is None else f" within {timeout:g} s"
        raise RequestTimedOut(f"no answer{within}", step=step, gradient_applied=applied) from error
    except Exception as error:
        status = getattr(error, "status_code", None)
        what = f"{type(error).__name__}{'' if status is None else f' (status {status})'}: {error}"
        raise RequestFailed(what, step=step, gradient_applied=applied) from error
