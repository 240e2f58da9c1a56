"""Long curves made short: a bucket's least, mean and greatest, so that no spike is lost."""

from __future__ import annotations

import dataclasses

import numpy as np

BUCKETS = 240  # as many points as a curve of a picture can use


@dataclasses.dataclass(frozen=True)
class Curve:
    """A thinned series: arrays [N], N ≤ buckets, NaN where a bucket has no number.

    Attributes:
      x: the mean step of a bucket.
      mean: of its numbers.
      low: the least of them.
      high: the greatest.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def alone(self) -> np.ndarray:
        """[N] whether a point has no neighbour to be joined to by a line."""
        there = np.pad(np.isfinite(self.mean), 1)
        return there[1:-1] & ~there[:-2] & ~there[2:]


def thin(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> Curve:
    """The curve [S] in at most ``buckets`` points.

    Example:
      >>> curve = thin(np.arange(6), np.array([0.0, 2.0, 9.0, 1.0, np.nan, np.nan]), 3)
      >>> curve.x, curve.mean, curve.high
      (array([0.5, 2.5, 4.5]), array([ 1.,  5., nan]), array([ 2.,  9., nan]))
    """
    starts = np.unique(np.arange(min(buckets, len(x))) * len(x) // max(1, min(buckets, len(x))))
    if not len(starts):
        return Curve(*(np.empty(0) for _ in range(4)))
    there = np.isfinite(y)
    count = np.add.reduceat(there, starts, dtype=float)
    sizes = np.diff(np.append(starts, len(x)))
    with np.errstate(invalid="ignore", over="ignore"):  # a bucket without a number is 0 / 0, and so NaN
        mean = np.add.reduceat(np.where(there, y, 0.0), starts) / count
        low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return Curve(np.add.reduceat(x.astype(float), starts) / sizes, mean, low, high)
