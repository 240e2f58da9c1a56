"""``jaxreg COMMAND``: finds the command, runs it, and says on one line what was wrong.

Written with argparse: a library for commands would be one more requirement of everybody who trains, for four
commands.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxreg.base.version import __version__
from jaxreg.cli import doctor, replay, report, watch
from jaxreg.cli.parser import Command, Parser

ABOUT = "Look after a training run: is this JAX sound, what does every term do, which one broke a step?"
EXAMPLES = """\
examples:
  %(prog)s doctor
  %(prog)s watch runs/train_lm/run.jsonl
  %(prog)s report runs/train_lm/run.jsonl
  %(prog)s replay step-00000041.flight --objective train:objective

%(prog)s COMMAND --help says more about one of them."""
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: what stands behind the program's name; by default that of this process.

    Returns:
      The exit status: 0 where all is well, 1 where the command failed or found something wrong.

    Raises:
      SystemExit: the arguments are none of the command's (status 2), or ask for help (0).

    Example:
      >>> main(["--version"])
      Traceback (most recent call last):
      SystemExit: 0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, names = _parser(_program())
    if not given:
        parser.print_help()
        return 0
    if not given[0].startswith("-") and given[0] not in names:
        parser.error(_no_such_command(given[0], names))
    options = parser.parse_args(given)
    command: Command = options.run
    who = f"{parser.prog} {options.command}"
    _take_any_text()
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads our output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 1
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError) as error:  # the user's to mend: one line, no traceback
        print(f"{who}: {error_line(error)}", file=sys.stderr)
        return 1


def error_line(error: Exception) -> str:
    """What is wrong, on one line.

    Example:
      >>> error_line(FileNotFoundError(2, "No such file or directory", "run.jsonl"))
      'run.jsonl: No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser(program: str) -> tuple[Parser, list[str]]:
    """The parser of everything, and the commands' names."""
    parser = Parser(prog=program, description=ABOUT, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=_versions(), help="print the versions and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (doctor, watch, report, replay):
        command.add(commands)
    return parser, list(commands.choices)


def _program() -> str:
    """How this process was started, for what is printed to be typed again."""
    return "python -m jaxreg" if Path(sys.argv[0]).name == "__main__.py" else "jaxreg"


def _versions() -> str:
    jaxlib, python = importlib.metadata.version("jaxlib"), platform.python_version()
    return f"jaxreg {__version__} (jax {jax.__version__}, jaxlib {jaxlib}, Python {python})"


def _no_such_command(given: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, names, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no command {given!r}; {hint}the commands are {', '.join(names)}"


def _take_any_text() -> None:
    """Let standard output write "?" for a letter that its encoding does not have, rather than fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
