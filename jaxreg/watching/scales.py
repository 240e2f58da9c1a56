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
      negative: whether any number is.
    """

    kind: Literal["linear", "log", "symlog", "share"] = "linear"
    threshold: float = 1.0
    negative: bool = False


Choice: TypeAlias = Callable[[Sequence[np.ndarray]], Scale]


def bounded(values: np.ndarray) -> np.ndarray:
    """The numbers as axes can show them: nothing beyond `LARGEST`, and 0 for what is nearly nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < SMALLEST, 0.0, np.clip(values, -LARGEST, LARGEST))


def plain(curves: Sequence[np.ndarray]) -> Scale:
    """A ruler, as one expects of an accuracy or a learning rate, unless most numbers would lie flat."""
    sizes = np.abs(_known(curves))
    low, high = np.quantile(sizes[sizes > 0], (0.1, 0.9)) if (sizes > 0).any() else (1.0, 1.0)
    return symmetric(curves) if high > 1000 * low else Scale()


def symmetric(curves: Sequence[np.ndarray]) -> Scale:
    """A scale for numbers of either sign and any size: logarithmic, and linear around 0 where there is need.

    Example:
      >>> symmetric([np.array([-5.0, 100.0, 0.02])])
      Scale(kind='symlog', threshold=0.1, negative=True)
      >>> [symmetric([np.array(y)]).kind for y in ([2.0, 3.0], [2.0, 300.0], [0.0, 2.0, 300.0])]
      ['linear', 'log', 'symlog']
    """
    values = _known(curves)
    sizes = np.abs(values[values != 0])
    if not len(sizes):
        return Scale()
    largest = float(sizes.max())
    if len(set(np.sign(values))) == 1 and largest < 20 * float(sizes.min()):
        return Scale()  # all of a size: a plain scale shows it best
    if (values > 0).all():
        return logarithmic(curves)
    threshold = max(float(np.quantile(sizes, 0.02)), largest * 10.0**-DECADES)
    return Scale("symlog", 10.0 ** math.floor(math.log10(threshold)), bool((values < 0).any()))


def logarithmic(curves: Sequence[np.ndarray]) -> Scale:
    """A scale for sizes. It begins where the smallest curve does, but for its lowest spikes.

    Example:
      >>> logarithmic([np.array([1.0, 100.0]), np.array([0.0, 0.0])]), logarithmic([np.ones(3)]).kind
      (Scale(kind='log', threshold=1.32..., negative=False), 'linear')
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
    """Give matplotlib's axes the scale, for what is drawn in them; those that share it have it, too."""
    if scale.kind == "linear":
        return
    if scale.kind == "share":
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
        return
    if scale.kind == "log":
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=scale.threshold)
    else:
        axes.set_yscale("symlog", linthresh=scale.threshold, linscale=0.4)
        if not scale.negative:
            axes.set_ylim(bottom=-0.3 * scale.threshold)
    low, high = axes.get_ylim()
    at = ticks(scale, low, high)
    axes.minorticks_off()
    axes.set_yticks(at, [power(value) for value in at])
    axes.set_ylim(low, high)


def ticks(scale: Scale, low: float, high: float, most: int = 8) -> list[float]:
    """Where numbers stand beside the axis: powers of ten, steps between where there are few of them.

    Example:
      >>> ticks(Scale("log"), 0.003, 2.0), ticks(Scale("log"), 3.0, 30.0)
      ([0.01, 0.1, 1.0], [5.0, 10.0, 20.0])
      >>> ticks(Scale("symlog", 0.1, True), -2.0, 20.0)
      [-1.0, -0.1, 0.0, 0.1, 1.0, 10.0]
    """
    least = low if scale.kind == "log" else scale.threshold
    sides = [(1.0, least, high)]
    if scale.kind == "symlog" and low < 0:
        sides.append((-1.0, least, -low))
    for factors in ((1.0,), (1.0, 2.0, 5.0)):
        found = {0.0} if scale.kind == "symlog" else set[float]()
        for sign, begin, end in sides:
            if 0 < begin <= end:
                decades = range(math.floor(math.log10(begin)), math.ceil(math.log10(end)) + 1)
                values = (float(f"{factor}e{decade}") for decade in decades for factor in factors)
                found |= {sign * value for value in values if 0.999 * begin <= value <= end}
        if len(found) >= 3:
            break
    at = sorted(found)
    stride, middle = math.ceil(len(at) / most), at.index(0.0) if 0.0 in at else 0
    return [value for i, value in enumerate(at) if (i - middle) % stride == 0]


def power(value: float) -> str:
    """A tick's number: as it is, or by its power of ten.

    Example:
      >>> power(0.01), power(-1e-7), power(2e6), power(0.0)
      ('0.01', '−10⁻⁷', '2·10⁶', '0')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    digits, _, exponent = f"{abs(value):.0e}".partition("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "−" * (value < 0) + (f"{digits}·" if digits != "1" else "") + f"10{raised}"


def _known(curves: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate([np.empty(0), *curves])
    return values[np.isfinite(values)]
