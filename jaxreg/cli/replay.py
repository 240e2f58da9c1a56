"""``jaxreg replay``: what a flight recording holds, and what went wrong first."""

from __future__ import annotations

import argparse
import sys

from jaxreg.cli.parser import Commands, readable

ABOUT = """\
Say what a flight recording holds; with --objective, compute a step of it again and say what went wrong
first.

The file is what telemetry.FlightRecorder writes, and safe to open, though it be a stranger's. The objective
is of your own code, which is imported from the folder that you are in."""
EXAMPLES = """\
examples:
  %(prog)s step-00000041.flight
  %(prog)s step-00000041.flight --objective train:objective
  %(prog)s step-00000041.flight --objective train:make_objective --step 40"""


def add(commands: Commands) -> None:
    """Let the parser know the command."""
    what = "recompute a recorded step, and find what went wrong first"
    parser = commands.add_parser("replay", help=what, description=ABOUT, epilog=EXAMPLES)
    parser.add_argument("path", metavar="FILE.flight", help="the recording")
    parser.add_argument(
        "--objective",
        metavar="MODULE:ATTRIBUTE",
        help="an objective, or a function without arguments that makes it",
    )
    parser.add_argument("--step", type=int, metavar="N", help="default: the last one, which went wrong")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the steps, or one of them in full."""
    from jaxreg.recorder.replay import replay, summary

    path = readable(options.path)
    if options.objective is None:
        if options.step is not None:
            raise ValueError("--step is computed again with an objective: --objective module:attribute")
        print(summary(path))
        print("\nname the objective to recompute a step: --objective module:attribute")
        return 0
    if "" not in sys.path:  # a script has its own folder there, and not the one that it is run in
        sys.path.insert(0, "")
    print(replay(path, options.objective, step=options.step))
    return 0
