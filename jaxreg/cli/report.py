"""``jaxreg report``: a page about a run, or about some side by side."""

from __future__ import annotations

import argparse

from jaxreg.cli.parser import Commands, folder, readable

ABOUT = """\
Write an HTML page about a run, with its pictures beside it as PNG, and print the page's path.

The page needs no network. Of several runs it compares the later ones with the first."""
EXAMPLES = """\
examples:
  %(prog)s runs/train_lm/run.jsonl
  %(prog)s runs/a/run.jsonl runs/b/run.jsonl -o compared"""


def add(commands: Commands) -> None:
    """Let the parser know the command."""
    what = "write an HTML page about a run, or compare runs"
    parser = commands.add_parser("report", help=what, description=ABOUT, epilog=EXAMPLES)
    parser.add_argument(
        "paths", metavar="RUN.jsonl", nargs="+", help="the run's file, and what to compare it with"
    )
    parser.add_argument(
        "-o", "--out", default="report", metavar="DIR", help="folder to write into; default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from jaxreg.watching.report import report

    out = folder(options.out)
    print(report(*map(readable, options.paths), out=out))
    return 0
