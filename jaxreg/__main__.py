"""``python -m jaxreg doctor``: does this JAX compute right on this machine?"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m jaxreg", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check this JAX's gradients against NumPy in float64")
    parser.parse_args(arguments)
    from jaxreg.testing import check_numerics

    report = check_numerics()
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
