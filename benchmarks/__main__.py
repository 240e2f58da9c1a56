"""The commands; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import benchmarks

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--torch-python", metavar="PYTHON", help="a Python with torch and torchjd")
    parser.add_argument("--case", choices=["outputs", "params"], help="only this one")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results too")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("compile", help="compile time of 32 terms")
    commands.add_parser("upgrad", help="UPGrad in place of the plain sum, next to TorchJD's")
    commands.add_parser("moving", help="norms now and then, and rules that move weights")
    commands.add_parser("accumulate", help="micro-batches: memory and time")
    commands.add_parser("client", help="the client's own work a step; needs --torch-python")
    commands.add_parser("host", help="host terms, and the cost of telemetry")
    soak = commands.add_parser("soak", help="steps that fail and are cancelled: leaks? needs psutil")
    soak.add_argument("--steps", type=int, default=10_000)
    programs = commands.add_parser("programs", help="flops, bytes, memory and collectives")
    programs.add_argument("--tpu", metavar="TOPOLOGY", help="such as v5e:2x4; needs jax[tpu]")
    options = parser.parse_args()
    if options.command == "compile":
        from benchmarks.commands.compile_time import compile_table
        from benchmarks.measure.table import machine

        print(f"{machine({})}\n\n{compile_table()}")
    elif options.command == "programs":
        from benchmarks.commands.programs import programs_table
        from benchmarks.measure.table import machine

        print(f"{machine({})}\n\n{programs_table(options.tpu)}")
    elif options.command == "moving":
        from benchmarks.commands.moving import moving_tables

        _run_tables(options, "moving", "Norms now and then, and rules,", moving_tables(options.quick))
    elif options.command == "accumulate":
        from benchmarks.commands.accumulate import accumulate_tables

        _run_tables(options, "accumulate", "Micro-batches", accumulate_tables(options.quick))
    elif options.command == "client":
        _run_client(options)
    elif options.command == "host":
        from benchmarks.commands.host import host_tables

        _run_tables(options, "host", "Host terms and telemetry", host_tables(options.quick))
    elif options.command == "soak":
        from benchmarks.commands.soak import run_soak

        run_soak(options.steps)
    else:
        _run_cases(options, upgrad=options.command == "upgrad")


def _run_tables(options: argparse.Namespace, name: str, heading: str, tables: str) -> None:
    """Print what a command measured, and write it to the results where that is asked for."""
    import jax

    from benchmarks.measure.table import machine

    where = machine({})
    print(f"{tables}\n\n{where}")
    if options.write:
        path = RESULTS / f"{name}-{jax.__version__}.md"
        path.write_text(f"# {heading} with jax {jax.__version__}\n\n{where}.\n\n{tables}\n")


def _run_client(options: argparse.Namespace) -> None:
    import jax

    from benchmarks.commands.client import run_client
    from benchmarks.contestants.torch_worker import has_torch
    from benchmarks.measure.table import machine

    torch_python = options.torch_python or (sys.executable if has_torch() else None)
    if torch_python is None:
        raise SystemExit("this Python cannot import torch; name one that can with --torch-python PYTHON")
    section, versions = run_client(torch_python, options.quick)
    print(f"{section}\n{machine(versions)}")
    if options.write:
        path = RESULTS / f"client-{jax.__version__}.md"
        path.write_text(f"# The client with jax {jax.__version__}\n\n{machine(versions)}.\n\n{section}")


def _run_cases(options: argparse.Namespace, upgrad: bool) -> None:
    import jax

    from benchmarks.cases import PROBLEMS
    from benchmarks.commands.case import run_case
    from benchmarks.contestants.torch_worker import has_torch
    from benchmarks.measure.table import machine

    torch_python = options.torch_python or (sys.executable if has_torch() else None)
    sections: list[str] = []
    versions: dict[str, str] = {}
    for case in [options.case] if options.case else PROBLEMS:
        section, versions = run_case(case, torch_python, options.quick, upgrad)
        sections.append(section)
        print(section, flush=True)
    where = machine(versions)
    print(where)
    if options.write:
        path = RESULTS / f"{'upgrad-' if upgrad else ''}{jax.__version__}.md"
        heading = f"# {'UPGrad' if upgrad else 'Timings'} with jax {jax.__version__}\n\n{where}.\n"
        path.write_text("\n".join([heading, *sections]))


if __name__ == "__main__":
    main()
