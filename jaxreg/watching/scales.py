"""Scales for numbers of any size, chosen from what is drawn; and put on matplotlib's axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

DECADES = 6  # a scale with a linear part around 0 spans no more of them
LARGEST, SMALLEST = 1e37, 1e-37  # what axes can show, here (float32) as in a browser


@dataclasses.dataclass(frozen=True)
class Scale:
    """How heights stand for numbers.

    Attributes:
      kind: ``"linear"``, ``"log"``, which has no place for 0, ``"symlog"``, logarithmic for either sign and
        linear around 0, or ``"share"``, areas on one another up to 100 %.
      threshold: of ``"symlog"``, where the linear part ends; of ``"log"``, where the axis begins.
    """

    kind: Literal["linear", "log", "symlog", "share"] = "linear"
    threshold: float = 1.0


Choice: TypeAlias = Callable[[Sequence[np.ndarray]], Scale]


def bounded(values: np.ndarray) -> np.ndarray:
    """The numbers as axes can show them: nothing beyond `LARGEST`, and 0 for what is nearly nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < SMALLEST, 0.0, np.clip(values, -LARGEST, LARGEST))


def linear(curves: Sequence[np.ndarray]) -> Scale:
    """As a ruler has it."""
    return Scale()


def share(curves: Sequence[np.ndarray]) -> Scale:
    """Parts of a whole."""
    return Scale("share")


def symmetric(curves: Sequence[np.ndarray]) -> Scale:
    """A scale for numbers of either sign and any size: logarithmic, and linear around 0.

    Example:
      >>> symmetric([np.array([-5.0, 100.0, 0.02])]), symmetric([np.array([2.0, 3.0])]).kind
      (Scale(kind='symlog', threshold=0.1), 'linear')
    """
    values = _known(curves)
    sizes = np.abs(values[values != 0])
    if not len(sizes):
        return Scale()
    largest = float(sizes.max())
    if len(set(np.sign(values))) == 1 and largest < 20 * float(sizes.min()):
        return Scale()  # all of a size: a plain scale shows it best
    threshold = max(float(np.quantile(sizes, 0.02)), largest * 10.0**-DECADES)
    return Scale("symlog", 10.0 ** math.floor(math.log10(threshold)))


def logarithmic(curves: Sequence[np.ndarray]) -> Scale:
    """A scale for sizes. It begins where the smallest curve does, but for its lowest spikes.

    Example:
      >>> logarithmic([np.array([1.0, 100.0]), np.array([0.0, 0.0])]), logarithmic([np.ones(3)]).kind
      (Scale(kind='log', threshold=1.98...), 'linear')
    """
    positive = [sizes for values in curves if len(sizes := values[np.isfinite(values) & (values > 0)])]
    if not positive:
        return Scale()
    largest = max(float(sizes.max()) for sizes in positive)
    if largest <= 5 * min(float(sizes.min()) for sizes in positive):
        return Scale()
    low = min(float(np.quantile(sizes, 0.01)) for sizes in positive)
    return Scale("log", max(low, largest * 10.0 ** (-2 * DECADES)) / 1.5)


def put(scale: Scale, axes: Any) -> None:
    """Give matplotlib's axes the scale; those that share it have it, too."""
    if scale.kind == "log":
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=scale.threshold)
        thin_ticks(axes)
    elif scale.kind == "symlog":
        axes.set_yscale("symlog", linthresh=scale.threshold, linscale=0.4)
        thin_ticks(axes)
    elif scale.kind == "share":
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])


def thin_ticks(axes: Any, most: int = 9) -> None:
    """Every second or third decade where there would be too many."""
    low, high = axes.get_ylim()
    ticks = [t for t in axes.get_yticks() if low <= t <= high]
    if len(ticks) > most:
        zero = ticks.index(0.0) if 0.0 in ticks else 0
        stride = math.ceil(len(ticks) / most)
        axes.set_yticks([tick for i, tick in enumerate(ticks) if (i - zero) % stride == 0])
        axes.set_ylim(low, high)


def _known(curves: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate([np.empty(0), *curves])
    return values[np.isfinite(values)]
