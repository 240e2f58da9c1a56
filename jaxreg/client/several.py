"""One step in several requests: their datums, and their replies as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from jaxreg.client.requests import arrived, waited
from jaxreg.client.types import ForwardBackwardOutput

_ADDED: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "max": max, "min": min}


def in_groups(datums: Sequence[Any], sizes: Sequence[int], requests: int) -> list[list[Any]]:
    """The datums that are sent in each request: whole datums of the caller's, as many in each as can be.

    Args:
      datums: what is sent.
      sizes: as how many of these each of the caller's datums is sent.
      requests: how many requests, at most one a datum of the caller's.
    """
    each, more = divmod(len(sizes), min(requests, len(sizes)))
    groups: list[list[Any]] = []
    at = first = 0
    while first < len(sizes):
        last = first + each + (len(groups) < more)
        count = sum(sizes[first:last])
        groups.append(list(datums[at : at + count]))
        at, first = at + count, last
    return groups


class Several:
    """The replies to several requests, which are waited for as one."""

    def __init__(self, futures: Sequence[Any]) -> None:
        self._futures = futures

    def result(self, timeout: float | None = None) -> Any:
        """The replies in one; TimeoutError where they are not all there after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        replies = []
        for future in self._futures:
            rest = None if end is None else max(end - time.monotonic(), 0.0)
            replies.append(waited(future, rest))
        return in_one(replies)

    def __await__(self) -> Generator[Any, None, Any]:
        async def all_of_them() -> Any:
            return in_one([await arrived(future, None) for future in self._futures])

        return all_of_them().__await__()

    def done(self) -> bool:
        """Whether all replies are there."""
        return all(getattr(future, "done", lambda: False)() for future in self._futures)


def as_one(futures: Sequence[Any]) -> Any:
    """One future of all of them."""
    return futures[0] if len(futures) == 1 else Several(futures)


def in_one(replies: Sequence[Any]) -> Any:
    """The reply that one request for all datums would have got.

    Of the server's metrics those are kept whose name says how they add up (``…:sum``, ``…:max``, ``…:min``).
    """
    outputs = [output for reply in replies for output in reply.loss_fn_outputs]
    every = [dict(getattr(reply, "metrics", None) or {}) for reply in replies]
    metrics = {
        name: _ADDED[kind]([own[name] for own in every])
        for name in every[0]
        if (kind := name.rpartition(":")[2]) in _ADDED and all(name in own for own in every)
    }
    kind = getattr(replies[0], "loss_fn_output_type", "")
    return ForwardBackwardOutput(kind, outputs, metrics)
