"""What the examples do at the terminal: check their arguments, and end at Ctrl-C with what there is."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jaxreg as jr

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """A parser that keeps the description as it is written, and says what is wrong on one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def steps(text: str) -> int:
    """A number of steps: at least one."""
    return _whole(text, 1, 10**9)


def seed(text: str) -> int:
    """What both NumPy and JAX take for a seed."""
    return _whole(text, 0, 2**31 - 1)


def rate(text: str) -> float:
    """A learning rate: above 0, and finite."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text!r}")


def url(text: str) -> str:
    """The address of a server."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"http://... or https://... is expected, not {text!r}")
    return text


def folder(text: str) -> Path:
    """A folder that is there or can be made."""
    for part in (whole := Path(text), *whole.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"a folder is expected, and {part} is a file")
    return whole


def new_run(path: Path) -> Path:
    """The run's file without the run of last time, since JSONL goes on with a file that is there."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise ValueError(f"{path} is there and no run's file; it is left as it is")
        path.unlink()
    return path


def need(*modules: str) -> None:
    """Refuse to begin what could not be shown at its end."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"there is no module {module}", name=module)


def _whole(text: str, least: int, most: int) -> int:
    with contextlib.suppress(ValueError):
        if least <= (value := int(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"a whole number from {least:,} to {most:,} is expected, not {text!r}")


class Stop:
    """Whether Ctrl-C was pressed. True from then on; a second one ends the program at once."""

    def __init__(self) -> None:
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def __call__(self, number: int, frame: object) -> None:
        """Hear the signal."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this step; Ctrl-C again ends it at once", file=sys.stderr, flush=True)

    def range(self, count: int, first: int = 0) -> Iterator[int]:
        """The steps' numbers, until Ctrl-C."""
        for step in range(first, count):
            if self:
                print(f"stopped after {step} of {count} steps")
                return
            yield step


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within, Ctrl-C lets the step end, and what stands behind the loop shows what there is.

    Nothing is torn out of a step: arrays that were donated are never without a successor.
    """
    before = signal.getsignal(signal.SIGINT)
    if isinstance(before, Stop):
        yield before
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield stop
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def tell_of_compiling(event: jr.telemetry.Event) -> None:
    """A handler that says what the first step waits for."""
    if event.name == "compile.start":
        print(f"compiling {event.metadata['program']} ...", flush=True)


def run(main: Callable[[list[str] | None], Any], arguments: list[str] | None = None) -> None:
    """Run an example as a program: a mistake of its user's is one line and status 1, not a traceback."""
    who = Path(sys.argv[0]).name
    try:
        with stoppable() as stop:
            main(arguments)
        if stop:
            sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, ValueError, ImportError, jr.client.RemoteError) as error:
        print(f"{who}: {_line(error)}", file=sys.stderr)
        sys.exit(1)


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = f': pip install "jaxreg[examples]", or {error.name} alone'
    return " ".join(str(error).split()) + hint
