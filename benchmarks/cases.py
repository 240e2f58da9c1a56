"""The two cases by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import outputs_case, params_case
from benchmarks.problem import Problem

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "outputs": outputs_case.problem,
    "params": params_case.problem,
}
