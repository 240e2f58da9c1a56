"""What happened, told to whoever asked: events, and the handlers that are attached to them.

``custom_loss.start``
    a step begins; metadata: ``terms``, and ``datums`` and ``tokens`` if known
``custom_loss.stop``
    it has its loss and gradient; measurements: ``duration`` (seconds) and its parts, if known;
    metadata: ``output`` (its `CustomLossOutput` of floats), ``report`` (its ``to_dict()``), ``metrics``
    (its flat names, and the caller's), ``inputs`` (an `Inputs`, or None), ``state_step`` (which step
    its state is for; None where there is none)
``custom_loss.exception``
    it failed; metadata: ``error``, ``inputs``
``regularizer.compute.start``
    a host term begins; metadata: ``term``
``regularizer.compute.stop``
    a term has its value; measurements: ``value``, ``weight``, ``contribution``, ``grad_norm`` and
    ``grad_norm_weighted`` where tracked, ``duration`` for host terms only: compiled terms have none of
    their own. A host term whose step failed before it counted has its duration alone, and
    ``counts=False`` in the metadata
``regularizer.compute.exception``
    a host term failed; metadata: ``term``, ``error``, ``on_error``
``compile.start``
    XLA begins to compile a program with an objective in it, which was traced before; metadata as of
    ``compile``
``compile``
    it has compiled it; measurements: ``duration``, tracing included; metadata: ``program``, ``changed``
    (what was new: shapes, dtypes, functions), ``terms``, ``functions`` (a number that tells objectives
    of equal names apart)
``server.exception``
    the remote backward request failed after the loss was told; metadata: ``error``
``warning``
    from `Warnings`; metadata: ``kind``, ``term`` (or None), ``message``
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

LOGGER = logging.getLogger("jaxreg.telemetry")
SLOW = 0.1  # seconds that a handler may take for an event before it is called slow


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
      name: what happened, such as ``custom_loss.stop``; the docstring of `jaxreg.base.events` lists them.
      step: the training step, or None where it is not known.
      time: seconds since 1970.
      measurements: numbers by name; durations are in seconds.
      metadata: everything else by name.

    Example:
      >>> import jaxreg as jr
      >>> def on_warning(event):
      ...     if event.name == "warning":
      ...         print(event.step, event.metadata["message"])
      >>> with jr.telemetry.attached(on_warning):
      ...     jr.telemetry.emit("warning", step=3, metadata={"kind": "mine", "message": "look here"})
      3 look here
    """

    name: str
    step: int | None
    time: float
    measurements: Mapping[str, float]
    metadata: Mapping[str, Any]


Handler: TypeAlias = Callable[[Event], object]
H = TypeVar("H", bound=Handler)


def worth_telling(times: int) -> bool:
    """Whether what has happened so many times is logged again: the first, tenth, hundredth, ... time."""
    return times in (1, 10, 100) or times % 1000 == 0


class _Attached:
    """A handler, and how it has behaved."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.slow, self.seconds = 0, 0.0

    def hear(self, event: Event) -> bool:
        """Tell the handler; False if it raised."""
        began = time.perf_counter()
        try:
            self.handler(event)
        except Exception:
            LOGGER.exception(
                "telemetry: the handler %r raised at %s and is detached; training goes on without it",
                self.handler,
                event.name,
            )
            return False
        self._count(time.perf_counter() - began)
        return True

    def _count(self, seconds: float) -> None:
        if seconds < SLOW:
            return
        self.slow, self.seconds = self.slow + 1, self.seconds + seconds
        if (remedy := getattr(self.handler, "_when_slow", "")) is None:  # it is rare, and meant
            return
        # The library's own may be slow now and then: they open a file, or are the first to write to it.
        if not worth_telling(self.slow) or (remedy and self.slow == 1):
            return
        LOGGER.warning(
            "telemetry: %s is slow: %d events took longer than %g s each, %.2f s in all, and the training "
            "loop waited; %s",
            type(self.handler).__name__ if remedy else f"the handler {self.handler!r}",
            self.slow,
            SLOW,
            self.seconds,
            remedy or "let it hand its work to a thread",
        )


_attached: tuple[_Attached, ...] = ()  # replaced, never changed, so that reading needs no lock
_lock = threading.RLock()  # reentrant: a handler may emit, attach and detach


def attach(handler: H) -> H:
    """Tell ``handler(event)`` every event from now on; gives the handler back.

    Handlers are called one at a time, in the order in which they were attached, in the thread in which
    the event happens, or in one that is telling events just then. One that raises is logged (logger
    ``jaxreg.telemetry``), detached and closed; one that takes longer than 0.1 s for an event is counted
    and logged. jaxreg's own say what can be done about it, where it goes on.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> heard = []
      >>> _ = jr.telemetry.attach(heard.append)
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [
      ...     dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=0.5)])
      >>> loss, out = objective(jnp.ones(3))
      >>> jr.telemetry.log(out, step=0)
      >>> jr.telemetry.detach(heard.append)
      >>> [event.name for event in heard if not event.name.startswith("compile")]
      ['regularizer.compute.stop', 'custom_loss.stop']
    """
    global _attached  # noqa: PLW0603 (the one list of handlers)
    if not callable(handler):
        raise TypeError(f"a handler is called with an Event; {type(handler).__name__} is not callable")
    with _lock:
        if any(entry.handler == handler for entry in _attached):
            raise ValueError(f"{handler!r} is attached already")
        _attached = (*_attached, _Attached(handler))
        if len(_attached) == 1:
            _quietly(_first)
    return handler


def detach(handler: Handler) -> None:
    """Tell the handler nothing more, and close it if it has a ``close()``. Unknown ones are ignored.

    Example:
      >>> import jaxreg as jr
      >>> handler = jr.telemetry.attach(print)
      >>> jr.telemetry.detach(handler)
    """
    with _lock:
        while _untold:  # what happened before it goes
            _tell(_untold.popleft())
    if _remove(handler):
        _close(handler)


@contextlib.contextmanager
def attached(*handlers: Handler) -> Iterator[tuple[Handler, ...]]:
    """Attach handlers for the length of a with statement, and close those that have a ``close()``.

    Example:
      >>> import jaxreg as jr
      >>> with jr.telemetry.attached(print):
      ...     pass
    """
    done: list[Handler] = []
    try:
        for handler in handlers:
            done.append(attach(handler))
        yield handlers
    finally:
        with contextlib.ExitStack() as stack:  # every one is closed, though another's close raise
            for handler in done:
                stack.callback(detach, handler)


def listening() -> bool:
    """Whether anybody is attached: where not, no event is made."""
    return bool(_attached)


def emit(
    name: str,
    *,
    step: int | None = None,
    measurements: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Tell every attached handler. Never raises what a handler raises, and never waits for one.

    Where another thread is telling handlers just now, it tells this event, too: a host term in a compiled
    program must not wait for a handler that waits for that program.

    Example:
      >>> import jaxreg as jr
      >>> with jr.telemetry.attached(lambda event: print(event.name, dict(event.measurements))):
      ...     jr.telemetry.emit("evaluated", step=100, measurements={"accuracy": 0.9})
      evaluated {'accuracy': 0.9}
    """
    if not _attached:
        return
    _untold.append(Event(name, step, time.time(), measurements or {}, metadata or {}))
    _tell_all()


_untold: collections.deque[Event] = collections.deque()


def _tell_all() -> None:
    while _untold and _lock.acquire(blocking=False):
        try:
            while _untold:
                _tell(_untold.popleft())
        finally:
            _lock.release()


def _tell(event: Event) -> None:
    stopped: BaseException | None = None
    for entry in _attached:
        if entry not in _attached:  # detached by a handler before it
            continue
        try:
            good = entry.hear(event)
        except BaseException as error:  # Ctrl-C; the others hear the event all the same
            stopped = error
            continue
        if not good:
            _remove(entry.handler)
            with contextlib.suppress(Exception):  # it is broken, and was logged
                _close(entry.handler)
    if stopped is not None:
        raise stopped


_first: list[Callable[[], None]] = []
_last: list[Callable[[], None]] = []


def while_listening(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Run ``begin`` when somebody attaches and ``end`` when the last one is gone."""
    _first.append(begin)
    _last.append(end)


def _quietly(calls: list[Callable[[], None]]) -> None:
    """JAX's listeners may have been cleared by somebody else; that is no reason to stop a training run."""
    for call in calls:
        try:
            call()
        except Exception:
            LOGGER.debug("telemetry: %r failed", call, exc_info=True)


def _close(handler: Handler) -> None:
    close = getattr(handler, "close", None)
    if callable(close):
        close()


def _remove(handler: Handler) -> bool:
    global _attached  # noqa: PLW0603
    with _lock:
        left = tuple(entry for entry in _attached if entry.handler != handler)
        found = len(left) < len(_attached)
        _attached = left
        if found and not left:
            _quietly(_last)
    return found
