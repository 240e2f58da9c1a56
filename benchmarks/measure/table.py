"""Markdown tables, and the machine that the figures are from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(torch_versions: Mapping[str, str]) -> str:
    """CPU, cores, versions and date, in one line."""
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    parts = [f"{_cpu()}, {os.cpu_count()} cores"]
    parts += [f"{name} {version}" for name, version in versions.items()]
    if torch_versions:
        parts.append("beside it " + ", ".join(f"{n} {v}" for n, v in torch_versions.items()))
    devices = {device.device_kind for device in jax.devices()}
    parts.append(f"JAX on {', '.join(sorted(devices))}")
    return "; ".join([*parts, datetime.datetime.now(datetime.UTC).date().isoformat()])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
    }
    return f"{fields.get('model name', platform.machine())}, {_width(fields.get('flags', ''))}"


def _width(flags: str) -> str:
    return next((name for name in ("avx512f", "avx2") if name in flags.split()), "no AVX2")
