"""Something to look at in a terminal: the terms of a run, live."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxreg.base.events import Event, attach, detach
from jaxreg.watching import records
from jaxreg.watching.board import Board
from jaxreg.watching.run import Tail
from jaxreg.watching.screen import Screen

if TYPE_CHECKING:
    import os

    from rich.console import Console

QUIET = 5.0  # seconds without a new line, after which watch says how long it has been


class LiveTable:
    """A table of the terms while training: value, weight, contribution, share of the gradient, trend.

    A handler, and a context manager that attaches it. In a terminal the table stays in place, and what the
    loop prints goes above it; in a notebook it is one output, updated in place; elsewhere (a file, a pipe) a
    plain table is printed about ten times a run. While XLA compiles the objective's program, it says so.
    A row's trend is its contribution over the last steps, between its own least and greatest. The share is
    that of `Run.share`.

    Args:
      steps: how many there will be, for the progress bar; None where that is not known.
      console: a ``rich.console.Console`` to draw on; standard output by default.
      refresh: drawings a second at most. In a terminal a thread of its own draws, and a step costs the loop
        microseconds; in a notebook drawing takes at most a twentieth of the loop's time.

    Raises:
      ImportError: rich is missing; the extra ``console`` brings it.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [
      ...     dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=0.5)])
      >>> with LiveTable(steps=1):
      ...     loss, out = objective(jnp.ones(3))
      ...     jr.telemetry.log(out, step=0)
      compiling jaxreg_call ...
      step 0 · ━━━━━━━━━━━━━━━━━━━━ 100%
      <BLANKLINE>
      term            value      weight    contrib.  trend
      ─────────  ──────────  ──────────  ──────────  ────────────────────
      base loss           3           1           3  ▁
      l2                  3         0.5         1.5  ▁
      total                                     4.5  ▁
      ...
    """

    _when_slow: ClassVar[str | None] = None  # it draws rarely, or in a thread

    def __init__(
        self, steps: int | None = None, *, console: Console | None = None, refresh: float = 4
    ) -> None:
        self._board, self._lock = Board(), threading.Lock()
        self._news: collections.deque[records.Item] = collections.deque()  # what the board has not taken yet
        self._steps, self._rarely = steps, _Rarely(steps)
        self._said: set[str] = set()  # programs whose compiling was told to a stream
        self._closed = False
        self._screen = Screen(console, self._view, self._lock, refresh)

    def __enter__(self) -> LiveTable:
        attach(self)
        self._closed = False
        return self

    def __exit__(self, *_: object) -> None:
        detach(self)
        self.close()  # where the handler is gone already, detach closes nothing

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if (item := _item(event)) is None:
            return
        self._news.append(item)
        if self._lock.acquire(blocking=False):  # else it is being drawn, and the loop does not wait for that
            try:
                self._take()
            finally:
                self._lock.release()
        if self._closed:
            return
        if self._screen.live:
            self._screen.show()
        elif isinstance(item, records.Record):
            if self._rarely.now(self._board.count):
                self._screen.print()
        elif item.event == "compile.start" and (program := item.details["program"]) not in self._said:
            self._said.add(program)
            self._screen.say(f"compiling {program} ...")

    def close(self) -> None:
        """Draw the last step and leave the terminal as it was."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._take()
        if self._screen.live:
            self._screen.stop()
        elif self._rarely.last != self._board.count:
            self._screen.print()

    def _take(self) -> None:
        """Let the board take what is new; whoever holds the lock."""
        while self._news:
            self._board.take(self._news.popleft())

    def _view(self) -> dict[str, Any]:
        self._take()
        return {"board": self._board, "steps": self._steps, "aside": _compiling(self._board)}


def _compiling(board: Board) -> str:
    """What XLA does just now, and for how long."""
    if board.compiling is None:
        return ""
    program, began = board.compiling
    seconds = time.time() - began
    return f"compiling {program} ..." + (f" {seconds:.0f} s" if seconds >= 1 else "")


def watch(
    path: str | os.PathLike[str],
    *,
    once: bool = False,
    interval: float = 0.5,
    console: Console | None = None,
) -> None:
    """Show the table of a run that another process is writing, until Ctrl-C.

    Args:
      path: the run's JSONL file; it may come later, be truncated or be replaced.
      once: print one table of what is there.
      interval: seconds between looks at the file.
      console: a ``rich.console.Console`` to draw on; standard output by default.

    Raises:
      ImportError: rich is missing; the extra ``console`` brings it.
      FileNotFoundError: there is no file, and ``once`` is set.
      OSError: there is one that cannot be read; a folder, for example.
      ValueError: it holds no step, and ``once`` is set.
    """
    watching = _Watching(Path(path), console, refresh=1 / max(interval, 0.1))
    if once:
        watching.print_once()
        return
    with contextlib.suppress(KeyboardInterrupt), watching:
        while True:
            watching.look()
            time.sleep(interval)


class _Watching:
    """A file, its board, and where that is shown."""

    def __init__(self, path: Path, console: Console | None, refresh: float) -> None:
        self._path, self._tail, self._board = path, Tail(path), Board()
        self._restarts, self._rarely = 0, _Rarely(None)
        self._news, self._aside, self._said = time.monotonic(), "", ""
        self._lock = threading.Lock()
        self._screen = Screen(console, self._view, self._lock, refresh)

    def __enter__(self) -> _Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self._aside = "" if self._board.count else "no step yet"
        if self._screen.live:
            self._screen.show()
            self._screen.stop()
        elif self._rarely.last != self._board.count:
            self._screen.print()

    def print_once(self) -> None:
        self._read()
        for item in self._tail.rest():
            self._board.take(item)
        if not self._board.count:
            raise ValueError(f"{self._path} holds no step of a run: {self._held()}")
        self._screen.print()

    def look(self) -> None:
        """Read what is new, and show it."""
        with self._lock:  # so that it is not drawn in between
            self._aside = self._waits_for()
        if self._screen.live:
            self._screen.show()
        elif self._rarely.now(self._board.count):
            self._screen.print()
        elif not self._board.count and self._aside != self._said:
            self._said = self._aside
            self._screen.print()

    def _waits_for(self) -> str:
        """Read what is new; what is missing, where anything is."""
        try:
            self._read()
        except OSError as error:
            never = isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError)
            if never or not (self._board.count or isinstance(error, FileNotFoundError)):
                raise  # waiting would not help
            if self._board.count:
                return "the file is gone; waiting for it"
            folder = self._path.parent
            missing = "" if folder.is_dir() else f" (there is no folder {folder} yet)"
            return f"waiting for the file {self._path}{missing}"
        quiet = time.monotonic() - self._news
        if not self._board.count:
            held = f": so far {self._held()}" if self._tail.skipped else ""
            return f"waiting for the first step in {self._path}{held}"
        return f"nothing new for {quiet:.0f} s" if quiet > QUIET else ""

    def _held(self) -> str:
        """What a file holds that has no step."""
        skipped, notes = self._tail.skipped, sum(self._board.counts.values())
        if notes:
            return f"only {notes} note{'s' * (notes > 1)}"
        return f"none of its {skipped:,} lines is one" if skipped else "it is empty so far"

    def _read(self) -> None:
        board, count = self._board, self._board.count
        for item in self._tail.poll():
            if self._tail.restarts != self._restarts:
                self._restarts, board, count = self._tail.restarts, Board(), 0
                self._rarely = _Rarely(None)
            board.take(item)
        if board is not self._board or board.count != count:
            self._board, self._news = board, time.monotonic()

    def _view(self) -> dict[str, Any]:
        skipped = self._tail.skipped
        lines = f"{skipped:,} line{'s' * (skipped > 1)} skipped" if skipped else ""
        # The file's name stands in what is waited for.
        title = self._path.name if self._board.count else ""
        return {"board": self._board, "title": title, "aside": self._aside or lines}


class _Rarely:
    """Now and then: about ten times a run, or 1, 2, 5, 10, 20, 50, ... where its length is not known."""

    def __init__(self, steps: int | None) -> None:
        self._every = max(1, steps // 10) if steps else None
        self._next, self.last = 1, 0

    def now(self, count: int) -> bool:
        """Whether this is the time, given how many steps there are."""
        if count < self._next:
            return False
        self.last = count
        while self._next <= count:
            self._next = self._after(self._next)
        return True

    def _after(self, at: int) -> int:
        if self._every is not None:
            return at + self._every if at > 1 else max(2, self._every)
        return at * 5 // 2 if str(at)[0] == "2" else at * 2


def _item(event: Event) -> records.Item | None:
    """The event as the line of a run's file that it makes."""
    when = {"step": event.step, "time": event.time}
    if event.name == "custom_loss.stop":
        return records.record(when | dict(event.metadata["report"]))
    if event.name in ("warning", "compile", "compile.start") or event.name.endswith(".exception"):
        said = {key: _plain(value) for key, value in event.metadata.items() if value is not None}
        seconds = event.measurements.get("duration")
        return records.note(when | said | {"event": event.name} | ({"seconds": seconds} if seconds else {}))
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return [*map(str, value)] if isinstance(value, list | tuple) else str(value)
