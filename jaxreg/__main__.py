"""``python -m jaxreg``: check this JAX, watch a run, report on it, replay a step that went wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeAlias

Command: TypeAlias = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m jaxreg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_doctor, add_watch, add_report, add_replay):
        add(commands)
    options = parser.parse_args(arguments)
    command: Command = options.run
    try:
        return command(options)
    except (OSError, ValueError, ImportError) as error:  # the user's to mend: one line, no traceback
        print(f"python -m jaxreg {options.command}: {error_line(error)}", file=sys.stderr)
        return 1


def error_line(error: Exception) -> str:
    """What is wrong, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``doctor``: does this JAX compute right on this machine?"""

    def doctor(options: argparse.Namespace) -> int:
        from jaxreg.testing import check_numerics

        report = check_numerics()
        print(report)
        return 0 if report.ok else 1

    parser = commands.add_parser("doctor", help="check this JAX's gradients against NumPy in float64")
    parser.set_defaults(run=doctor)


def add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``watch``: the live table of a run that another process writes."""

    def watch(options: argparse.Namespace) -> int:
        from jaxreg.watching.console import watch

        watch(options.path, once=options.once, interval=options.interval)
        return 0

    parser = commands.add_parser("watch", help="show a run's terms while its file grows")
    parser.add_argument("path", metavar="RUN.jsonl", help="the run's file; it may come later")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--interval", type=seconds, default=0.5, metavar="SECONDS", help="default: 0.5")
    parser.set_defaults(run=watch)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``report``: a page about a run, or about some side by side."""

    def report(options: argparse.Namespace) -> int:
        from jaxreg.watching.report import report

        print(report(options.path, *options.more, out=options.out))
        return 0

    parser = commands.add_parser("report", help="write an HTML page about a run, or compare runs")
    parser.add_argument("path", metavar="RUN.jsonl", help="the run's file")
    parser.add_argument("more", metavar="OTHER.jsonl", nargs="*", help="runs to compare it with")
    parser.add_argument("-o", "--out", default="report", metavar="DIR", help="default: report")
    parser.set_defaults(run=report)


def add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``replay``: what a flight recording holds, and what went wrong first."""

    def replay(options: argparse.Namespace) -> int:
        from jaxreg.recorder.replay import replay, summary

        if options.objective is None:
            print(summary(options.path))
            print("\nname the objective to recompute a step: --objective module:attribute")
            return 0
        print(replay(options.path, options.objective, step=options.step))
        return 0

    parser = commands.add_parser("replay", help="recompute a recorded step, and find what went wrong first")
    parser.add_argument(
        "path", metavar="FILE.flight", help="what FlightRecorder wrote; it may be a stranger's"
    )
    parser.add_argument(
        "--objective",
        metavar="MODULE:ATTRIBUTE",
        help="an objective of your own code, or a function making it",
    )
    parser.add_argument("--step", type=int, help="default: the last one, which went wrong")
    parser.set_defaults(run=replay)


def seconds(text: str) -> float:
    """A time of more than nothing."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"more than 0 seconds, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
