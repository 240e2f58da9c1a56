"""A future that can be waited for in both worlds, as the SDK's can."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ClientFuture(Generic[T]):
    """A reply that is on its way: ``.result()`` blocks, ``await`` does not."""

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        """The reply, or the server's error; TimeoutError after ``timeout`` seconds."""
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """`result`, for event loops. Giving up waiting does not take the request back."""
        async with asyncio.timeout(timeout):
            return await asyncio.shield(asyncio.wrap_future(self._future))

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        if not self._future.done():
            return "<ClientFuture: on its way>"
        error = None if self._future.cancelled() else self._future.exception()
        return f"<ClientFuture: {'cancelled' if self._future.cancelled() else _outcome(error)}>"

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()


def _outcome(error: BaseException | None) -> str:
    return "done" if error is None else f"failed, {type(error).__name__}"
