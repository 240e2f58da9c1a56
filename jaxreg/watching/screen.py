"""Where a live table is drawn: in place in a terminal or a notebook, else below what was printed before."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxreg.base.extras import need

if TYPE_CHECKING:
    from rich.console import Console

View: TypeAlias = Callable[[], dict[str, Any]]  # what `BoardTable` is made of, as it stands now
LEAST_SHARE = 20  # a notebook's table is drawn in the loop's thread, and takes at most 1/20 of its time
PRE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


class Screen:
    """A terminal, a notebook's output or a stream.

    Args:
      console: what to draw on; standard output by default.
      view: what to draw, asked for with the lock held.
      refresh: drawings a second, where they are in place.

    Attributes:
      live: whether `show` draws in place; a stream only takes what is printed.

    Raises:
      ImportError: rich is missing; the extra ``console`` brings it.
    """

    def __init__(self, console: Console | None, view: View, lock: threading.Lock, refresh: float) -> None:
        need("rich", "console", "the live table")
        from rich.console import Console

        self._console = console or Console(highlight=False)
        self._view, self._lock = view, lock
        self._place: _Terminal | _Notebook | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._place = _Terminal(self._console, self._rendered, refresh)
        elif self._console.is_jupyter:
            self._place = _Notebook(self._console, self._table, lock, refresh)
        self.live = self._place is not None

    def show(self) -> None:
        """There is something new to draw in place."""
        if self._place is not None:
            self._place.show()

    def print(self) -> None:
        """Print the table once, below what was printed before."""
        with self._lock:
            self._console.print(self._table(), "")

    def say(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Draw all of it a last time; the cursor and the streams are what they were."""
        if self._place is not None:
            self._place.stop()

    def _table(self, height: int | None = None) -> Any:
        from jaxreg.watching.table import BoardTable

        return BoardTable(**self._view(), height=height)

    def _rendered(self, height: int | None) -> Any:
        """The table in lines, so that no step comes in between."""
        from jaxreg.watching.table import Drawn

        with self._lock:
            return Drawn(self._console.render_lines(self._table(height), pad=False))


class _Terminal:
    """The table stays in place, cut to the terminal until its end; a thread draws it."""

    def __init__(self, console: Console, rendered: Callable[[int | None], Any], refresh: float) -> None:
        from rich.live import Live

        self._console, self._rendered, self._whole = console, rendered, False
        self._live = Live(
            get_renderable=self._drawn,
            console=console,
            refresh_per_second=refresh,
            vertical_overflow="visible",
        )

    def _drawn(self) -> Any:
        return self._rendered(None if self._whole else self._console.height)

    def show(self) -> None:
        if not self._live.is_started:
            self._whole = False
            self._live.start()

    def stop(self) -> None:
        self._whole = True
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone; the loop's end is not ours
            self._live.stop()


class _Notebook:
    """One output of a cell, which is replaced by what is new."""

    def __init__(
        self, console: Console, table: Callable[[], Any], lock: threading.Lock, refresh: float
    ) -> None:
        self._console, self._table, self._lock = console, table, lock
        self._pause, self._next = 1 / refresh, 0.0
        self._handle: Any = None

    def show(self) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        self._draw()
        ended = time.monotonic()
        self._next = ended + max(self._pause, LEAST_SHARE * (ended - began))

    def stop(self) -> None:
        if self._handle is not None:
            self._draw()
        self._handle, self._next = None, 0.0  # another cell gets an output of its own

    def _draw(self) -> None:
        with self._lock:
            output = _output(self._table(), self._console.width)
        if self._handle is not None:
            self._handle.update(output)
            return
        from IPython.display import display  # there where a notebook is

        self._handle = display(output, display_id=True)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a notebook shows: HTML, and text where it knows none."""

    html: str
    text: str

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}


def _output(table: Any, width: int) -> Output:
    from rich.console import Console

    paper = Console(record=True, file=io.StringIO(), width=width, force_jupyter=False, highlight=False)
    paper.print(table)
    text = paper.export_text(clear=False)
    return Output(paper.export_html(inline_styles=True, code_format=PRE), text)
