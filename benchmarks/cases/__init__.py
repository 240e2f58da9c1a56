"""The two cases by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import outputs, params
from benchmarks.cases.problem import Problem

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "outputs": outputs.problem,
    "params": params.problem,
}
