"""Pairs of terms whose gradients pull against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreg.base.types import Array


class Conflict(NamedTuple):
    """Two terms whose gradients pull against each other, and the cosine of the angle between them.

    Example:
      >>> import jaxreg as jr
      >>> jr.Conflict("base_loss", "kl", -0.5).cosine
      -0.5
    """

    first: str
    second: str
    cosine: float


def conflicts_of(names: Sequence[str], gramian: Array, below: float) -> list[Conflict]:
    """The pairs whose cosine is less than ``below``, the worst first."""
    if isinstance(gramian, jax.core.Tracer):
        raise TypeError(
            "conflicts() reads numbers, which do not exist while JAX traces: return the output from the "
            "jitted function and call it outside; cosines() may be traced"
        )
    if np.ndim(gramian) != 2:
        raise ValueError(
            f"the Gramian has shape {np.shape(gramian)}, so the output holds more than one step (vmap, "
            f"scan): take one, jax.tree.map(lambda a: a[i], out)"
        )
    values = host_cosines(gramian)
    pairs = [
        Conflict(names[i], names[j], float(values[i, j]))
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if values[i, j] < below
    ]
    return sorted(pairs, key=lambda pair: pair.cosine)


def host_cosines(gramian: Array) -> np.ndarray:
    """`jaxreg.core.gramian.cosines` of a Gramian whose numbers are there, without a device."""
    gram = np.asarray(gramian, np.float64)
    norms = np.sqrt(np.diagonal(gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(gram / np.outer(norms, norms), -1, 1)
    ratio[(norms == 0)[:, None] | (norms == 0)[None, :]] = 0
    np.fill_diagonal(ratio, np.where(np.isnan(norms), np.nan, 1))
    return ratio
