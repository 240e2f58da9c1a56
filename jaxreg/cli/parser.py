"""What the commands' arguments have in common: how they are asked for, and what is refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

Command: TypeAlias = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """A parser that keeps its text as it is written, and says what is wrong on one line.

    Example:
      >>> Parser(prog="jaxreg").parse_args(["--fast"])
      Traceback (most recent call last):
      SystemExit: 2
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def seconds(text: str) -> float:
    """A time of more than nothing.

    Example:
      >>> seconds("0.5")
      0.5
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is expected, not {text!r}")
    return value


def readable(path: str) -> str:
    """The path, if it is not of something that is never read to its end, such as a device.

    Example:
      >>> readable("run.jsonl")
      'run.jsonl'
    """
    if not path:
        raise ValueError("the file's name is empty")
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path} is no regular file")
    return path  # of a folder, and where there is nothing, opening it tells


def folder(path: str) -> Path:
    """A folder that is there or can be made, told before there is work to be lost.

    Example:
      >>> folder("report/of/a/run").parts
      ('report', 'of', 'a', 'run')
    """
    if not path:
        raise ValueError("the folder's name is empty")
    for part in (whole := Path(path), *whole.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{path} should be a folder to write into, but a file {part} exists")
    return whole
