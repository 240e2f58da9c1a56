"""Top-K targets, [T, K], for servers that know one target a token: K datums in place of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxreg.client import wire


class Slots:
    """How datums are sent: as they are, or with one datum a slot of their [T, K] targets.

    The cross-entropy is a sum over slots, so its gradient is the same both ways; K datums cost K forward and
    backward passes on the server.
    """

    def __init__(self, targets: Sequence[np.ndarray], unrolled: bool) -> None:
        self._widths = [t.shape[1] if unrolled and t.ndim == 2 else 0 for t in targets]
        self._whole = targets
        self.targets = [part for t, k in zip(targets, self._widths, strict=True) for part in _parts(t, k)]

    def spread(self, data: Sequence[Any], weights: Sequence[np.ndarray]) -> list[Any]:
        """The datums that are sent."""
        sent = []
        for datum, own, width, targets in zip(data, weights, self._widths, self._whole, strict=True):
            if width:
                pairs = zip(_parts(targets, width), _parts(own, width), strict=True)
                sent += [wire.with_weights(datum, w, targets=t) for t, w in pairs]
            else:
                sent.append(wire.with_weights(datum, own))
        return sent

    def gather(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One array a datum, of its targets' shape, of one a datum that was sent."""
        rest = iter(arrays)
        return [
            np.stack([next(rest) for _ in range(width)], axis=-1) if width else next(rest)
            for width in self._widths
        ]


def _parts(array: np.ndarray, width: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(array[:, k]) for k in range(width)] if width else [array]
