"""Which rows are pairs: k stands for the chosen and −k for the rejected answer of pair k, 0 for padding."""

from __future__ import annotations

import numpy as np

from jaxreg.base.types import Array


def pair_numbers(counted: np.ndarray, datums: int) -> np.ndarray:
    """[B]: 1, −1, 2, −2, ... of rows that alternate, chosen and rejected; 0 for padded rows.

    Raises:
      ValueError: an odd number of rows, or of a pair only one answer has a token that counts [B, T].
    """
    rows = len(counted)
    if rows % 2:
        raise ValueError(f"pairs are padded to an even number of rows; the bucket is {rows}")
    counts = counted.any(axis=1).reshape(-1, 2)
    if (half := counts[:, 0] ^ counts[:, 1]).any():
        i = int(np.argmax(half))
        raise ValueError(
            f"pair {i}: its {'rejected' if counts[i, 0] else 'chosen'} answer has no token that counts (all "
            f"are masked or of weight 0), but the other one has; leave the pair out"
        )
    pairs = np.zeros(rows, np.int32)
    pairs[0:datums:2] = np.arange(1, datums // 2 + 1)
    pairs[1:datums:2] = -pairs[0:datums:2]
    return pairs


def broken_pairs(pairs: Array) -> Array:
    """Of numbers [B], B even, in which of the B/2 places no pair stands: bool [B/2]."""
    chosen, rejected = pairs[0::2], pairs[1::2]
    return (chosen != -rejected) | (chosen < 0)
