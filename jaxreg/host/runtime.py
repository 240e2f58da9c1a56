"""What is remembered of a host term between steps, and what a step needs to know of the term."""
# ruff: noqa: D102 (what the properties are stands at the arguments of HostRegularizer)

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from jaxreg.host.result import HostValue
from jaxreg.host.runners import Coroutines, Processes, Runner, Threads

RUNNERS: dict[str, Callable[..., Runner]] = {
    "coroutine": Coroutines,
    "thread": Threads,
    "process": Processes,
}


class Term(Protocol):
    """A host term as a step sees it: a `HostRegularizer`, whose arguments say what these are."""

    @property
    def name(self) -> str: ...
    @property
    def fn(self) -> Any: ...
    @property
    def timeout(self) -> float | None: ...
    @property
    def on_error(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def takes_logprobs(self) -> bool: ...
    @property
    def compositions(self) -> dict[Any, Any]: ...
    @property
    def runtime(self) -> Runtime: ...


class Runtime:
    """A host term's runner, its last good value, and how often it failed.

    Args:
      owner: who has it; when that goes, so do its threads and processes.
      run: the runner's name.
      fn, name, most: what it runs, what its threads are called, how many calls at once.
    """

    def __init__(self, owner: object, run: str, fn: Callable[..., Any], name: str, most: int) -> None:
        self.runner = RUNNERS[run](fn, f"jaxreg-host-{name}", most)
        self.close = weakref.finalize(owner, self.runner.close)  # also when the interpreter ends
        self._lock = threading.Lock()
        self._asked = 0
        self._failures = 0
        self._last: tuple[HostValue, int] | None = None

    def asks(self) -> int:
        """Count one call; its number."""
        with self._lock:
            self._asked += 1
            return self._asked

    def good(self, value: HostValue, number: int) -> None:
        """Remember the value of a call, unless a later one is known."""
        with self._lock:
            if self._last is None or self._last[1] < number:
                self._last = dataclasses.replace(value, gradient=None), number  # never used again

    def failed(self, number: int) -> tuple[int, HostValue | None, int]:
        """Count a failure: how many there were, the last good value, and how many calls old it is."""
        with self._lock:
            self._failures += 1
            value, at = self._last or (None, 0)
            return self._failures, value, number - at
