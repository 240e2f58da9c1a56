"""``jaxreg doctor``: does this JAX compute right on this machine?"""

from __future__ import annotations

import argparse
import os

import jax

from jaxreg.cli.parser import Commands

ABOUT = """\
Check this JAX's gradients on this machine against NumPy in float64.

Some releases of JAX compute wrong gradients on CPUs, without a warning. This compares the patterns that
are known to go wrong, in seconds, and says which release to take instead. The exit status is 0 where all
agree."""
EXAMPLES = """\
examples:
  %(prog)s
  JAX_PLATFORMS=cpu %(prog)s      # of the CPU, on a machine that has more"""


def add(commands: Commands) -> None:
    """Let the parser know the command."""
    what = "check this JAX's gradients against NumPy in float64"
    parser = commands.add_parser("doctor", help=what, description=ABOUT, epilog=EXAMPLES)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what was compared; 1 where something is wrong."""
    from jaxreg.testing import check_numerics

    try:
        jax.devices()
    except Exception as error:  # what it raises where a platform is asked for and not there, differs
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error) or type(error).__name__
        raise OSError(f"JAX starts on no device (JAX_PLATFORMS={asked!r}): {why}") from error
    report = check_numerics()
    print(report)
    return 0 if report.ok else 1
