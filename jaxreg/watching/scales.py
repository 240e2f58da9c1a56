"""Scales for numbers of any size, chosen from what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

DECADES = 6  # a scale with a linear part around 0 spans no more of them
Scale: TypeAlias = Callable[[Sequence[Any], np.ndarray], None]


def symmetric(panels: Sequence[Any], values: np.ndarray) -> None:
    """A scale for numbers of either sign and any size: logarithmic, and linear around 0."""
    sizes = np.abs(values[values != 0])
    if not len(sizes):
        return
    largest = float(sizes.max())
    if len(set(np.sign(values))) == 1 and largest < 20 * float(sizes.min()):
        return  # all of a size: a plain scale shows it best
    threshold = max(float(np.quantile(sizes, 0.02)), largest * 10.0**-DECADES)
    for axes in panels[:1]:  # the others share it
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(threshold)), linscale=0.4)
        thin_ticks(axes)
    for axes in panels:
        axes.axhline(0, color=axes.xaxis.label.get_color(), lw=0.6, alpha=0.6)


def logarithmic(panels: Sequence[Any], values: np.ndarray) -> None:
    """A scale for sizes; 0 has no place on it."""
    sizes = values[values > 0]
    if len(sizes) and float(sizes.max()) > 5 * float(sizes.min()):
        low = max(float(sizes.min()), float(sizes.max()) * 10.0 ** -(2 * DECADES))
        panels[0].set_yscale("log", nonpositive="mask")
        panels[0].set_ylim(bottom=low / 1.5)


def thin_ticks(axes: Any, most: int = 9) -> None:
    """Every second or third decade where there would be too many."""
    ticks = [t for t in axes.get_yticks() if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    if len(ticks) > most:
        zero = ticks.index(0.0) if 0.0 in ticks else 0
        stride = math.ceil(len(ticks) / most)
        axes.set_yticks([tick for i, tick in enumerate(ticks) if (i - zero) % stride == 0])
