"""``jaxreg watch``: the live table of a run that another process writes."""

from __future__ import annotations

import argparse

from jaxreg.cli.parser import Commands, readable, seconds

ABOUT = """\
Show a run's terms while its file grows: value, weight, contribution, share of the gradient, trend.

The file is what telemetry.JSONL writes. It may come later, be truncated or be replaced; Ctrl-C ends it."""
EXAMPLES = """\
examples:
  %(prog)s runs/train_lm/run.jsonl
  %(prog)s runs/train_lm/run.jsonl --once      # one table of what is there"""


def add(commands: Commands) -> None:
    """Let the parser know the command."""
    what = "show a run's terms while its file grows"
    parser = commands.add_parser("watch", help=what, description=ABOUT, epilog=EXAMPLES)
    parser.add_argument("path", metavar="RUN.jsonl", help="the run's file")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument(
        "--interval",
        type=seconds,
        default=0.5,
        metavar="SECONDS",
        help="between looks at the file; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show it until Ctrl-C, or once."""
    from jaxreg.watching.console import watch

    watch(readable(options.path), once=options.once, interval=options.interval)
    return 0
