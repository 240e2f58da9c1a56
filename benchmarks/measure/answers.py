"""What a contestant computed, and how far it is from float64. Needs NumPy only."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import numpy as np

# "values" [K], "norms" (or "output norms", "untied norms") [K], and one direction's "<direction>/<leaf>".
Answer: TypeAlias = dict[str, np.ndarray]

# The plain sum's gradient, and what UPGrad makes of the terms', combined at the outputs or in the parameters.
DIRECTIONS = ("gradient", "upgrad outputs", "upgrad params")

TOLERANCE = 1e-4
UPGRAD_TOLERANCE = 1e-3  # what is lost where a float32 Gramian decides how much of which gradient is taken


def save(path: str, arrays: Answer) -> None:
    """Write arrays for another process."""
    np.savez(path, **cast(dict[str, Any], arrays))


def worst_error(answer: Answer, reference: Answer) -> tuple[float, str]:
    """The relative error that is the largest in tolerances, and where it is."""
    directions = {_kind(name) for name in answer} & set(DIRECTIONS)
    for name in reference:
        if _kind(name) in {"values", *directions} and name not in answer:
            return np.inf, f"{name} (missing)"
    if not directions:
        return np.inf, "gradient (missing)"
    errors = {name: _error(name, array, reference[name]) for name, array in answer.items()}
    worst = max(errors, key=lambda name: errors[name] / tolerance(name))
    return errors[worst], worst


def tolerance(name: str) -> float:
    """What part of an answer may be off by."""
    return UPGRAD_TOLERANCE if name.startswith("upgrad") else TOLERANCE


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _error(name: str, array: np.ndarray, reference: np.ndarray) -> float:
    if array.shape != reference.shape:
        return np.inf
    gap, size = np.abs(np.asarray(array, np.float64) - reference), np.abs(reference)
    error = np.max(gap) / np.max(size) if _kind(name) in DIRECTIONS else np.max(gap / size)
    return float(error) if np.isfinite(error) else np.inf
