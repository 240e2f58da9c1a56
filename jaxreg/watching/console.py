"""Something to look at in a terminal: the terms of a run, live."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxreg.base.events import Event, attach, detach
from jaxreg.base.extras import need
from jaxreg.watching import records
from jaxreg.watching.board import Board
from jaxreg.watching.run import Tail

if TYPE_CHECKING:
    import os

    from rich.console import Console

QUIET = 5.0  # seconds without a new line, after which watch says how long it has been


class LiveTable:
    """A table of the terms while training: value, weight, contribution, share of the gradient, trend.

    A handler, and a context manager that attaches it. In a terminal the table stays in place, and what the
    loop prints goes above it; elsewhere (a file, a notebook) a plain table is printed about ten times a run.
    A row's trend is its contribution over the last steps, between its own least and greatest. The share is
    that of `Run.share`.

    Args:
      steps: how many there will be, for the progress bar; None where that is not known.
      console: a ``rich.console.Console`` to draw on; standard output by default.
      refresh: drawings a second. Drawing happens in a thread of its own: a step costs the loop microseconds.

    Raises:
      ImportError: rich is missing; the extra ``console`` brings it.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> objective = jr.compose(lambda x, batch: jnp.sum(x), [
      ...     dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=0.5)])
      >>> with LiveTable(steps=1):
      ...     loss, out = objective(jnp.ones(3))
      ...     jr.telemetry.log(out, step=0)
      step 0 · ━━━━━━━━━━━━━━━━━━━━ 100%
      <BLANKLINE>
      term            value      weight    contrib.  trend
      ─────────  ──────────  ──────────  ──────────  ────────────────────
      base loss           3           1           3  ▁
      l2                  3         0.5         1.5  ▁
      total                                     4.5  ▁
      ...
    """

    def __init__(
        self, steps: int | None = None, *, console: Console | None = None, refresh: float = 4
    ) -> None:
        self._board, self._lock = Board(), threading.Lock()
        self._screen = _Screen(console, self._lock, refresh)
        self._view: dict[str, Any] = {"board": self._board, "steps": steps}
        self._rarely = _Rarely(steps)
        self._closed = False

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
        with self._lock:
            self._board.take(item)
        if self._closed:
            return
        if self._screen.live:
            self._screen.show(self._view)
        elif isinstance(item, records.Record) and self._rarely.now(self._board.count):
            self._screen.print(self._view)

    def close(self) -> None:
        """Draw the last step and leave the terminal as it was."""
        if self._closed:
            return
        self._closed = True
        if self._screen.live:
            self._screen.stop()
        elif self._rarely.last != self._board.count:
            self._screen.print(self._view)


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
    """
    watching = _Watching(Path(path), _Screen(console, threading.Lock(), 1 / max(interval, 0.1)))
    if once:
        watching.print_once()
        return
    with contextlib.suppress(KeyboardInterrupt), watching:
        while True:
            watching.look()
            time.sleep(interval)


class _Watching:
    """A file, its board, and where that is shown."""

    def __init__(self, path: Path, screen: _Screen) -> None:
        self._path, self._screen, self._tail = path, screen, Tail(path)
        self._board, self._restarts, self._rarely = Board(), 0, _Rarely(None)
        self._news, self._said = time.monotonic(), ""

    def __enter__(self) -> _Watching:
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen.live:
            self._screen.show(self._view("" if self._board.count else "no step yet"))
            self._screen.stop()
        elif self._rarely.last != self._board.count:
            self._screen.print(self._view())

    def print_once(self) -> None:
        self._read()
        for item in self._tail.rest():
            self._board.take(item)
        self._screen.print(self._view("" if self._board.count else "no step yet"))

    def look(self) -> None:
        """Read what is new, and show it."""
        aside = ""
        try:
            self._read()
        except OSError as error:
            if isinstance(error, PermissionError | IsADirectoryError):
                raise  # waiting would not help
            aside = "waiting for the file" if not self._board.count else "the file is gone; waiting for it"
        quiet = time.monotonic() - self._news
        if not aside and not self._board.count:
            aside = "waiting for the first step"
        elif not aside and quiet > QUIET:
            aside = f"nothing new for {quiet:.0f} s"
        if self._screen.live:
            self._screen.show(self._view(aside))
        elif self._rarely.now(self._board.count):
            self._screen.print(self._view())
        elif not self._board.count and aside != self._said:
            self._said = aside
            self._screen.print(self._view(aside))

    def _read(self) -> None:
        board, count = self._board, self._board.count
        for item in self._tail.poll():
            if self._tail.restarts != self._restarts:
                self._restarts, board, count = self._tail.restarts, Board(), 0
                self._rarely = _Rarely(None)
            board.take(item)
        if board is not self._board or board.count != count:
            self._board, self._news = board, time.monotonic()

    def _view(self, aside: str = "") -> dict[str, Any]:
        skipped = self._tail.skipped
        lines = f"{skipped:,} line{'s' * (skipped > 1)} skipped" if skipped else ""
        return {"board": self._board, "title": self._path.name, "aside": aside or lines}


class _Screen:
    """Where the table is drawn: a terminal, in place, or a stream, one after another."""

    def __init__(self, console: Console | None, lock: threading.Lock, refresh: float) -> None:
        need("rich", "console", "the live table")
        from rich.console import Console
        from rich.live import Live

        from jaxreg.watching import table

        self._table = table
        self._console = console or Console(highlight=False)
        self.live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._lock, self._view, self._whole = lock, dict[str, Any](), False
        self._live = Live(
            get_renderable=self._drawn,
            console=self._console,
            refresh_per_second=refresh,
            vertical_overflow="visible",
        )

    def _drawn(self) -> Any:
        """The table as it stands now, cut to the terminal except at the end."""
        if not self._view:
            return ""
        height = None if self._whole else self._console.height
        with self._lock:  # rendered here, so that no step comes in between
            lines = self._console.render_lines(self._table.BoardTable(**self._view, height=height), pad=False)
        return self._table.Drawn(lines)

    def show(self, view: Mapping[str, Any]) -> None:
        """Draw this from now on."""
        self._view = dict(view)
        if not self._live.is_started:
            self._live.start()

    def print(self, view: Mapping[str, Any]) -> None:
        """Print it once, below what was printed before."""
        with self._lock:
            self._console.print(self._table.BoardTable(**view), "")

    def stop(self) -> None:
        """Draw all of it a last time; the cursor and the streams are what they were."""
        self._whole = True
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone; the loop's end is not ours
            self._live.stop()


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
    if event.name in ("warning", "compile") or event.name.endswith(".exception"):
        said = {key: _plain(value) for key, value in event.metadata.items() if value is not None}
        seconds = event.measurements.get("duration")
        return records.note(when | said | {"event": event.name} | ({"seconds": seconds} if seconds else {}))
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return [*map(str, value)] if isinstance(value, list | tuple) else str(value)
