"""The sizes that a batch is padded to.

Every size that is new compiles a program, and every padded token is computed for nothing. A model in this
process pays for both, so its sizes lie close together; where only a loss is computed here, padding costs next
to nothing, and a few sizes do. Numbers of rows are always even, so that pairs stay pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Buckets: TypeAlias = Sequence[int] | Callable[[int], int]

SHORTEST, SHORTEST_COARSE, FEWEST_ROWS_COARSE = 8, 128, 4


def close_length(n: int) -> int:
    """The smallest of 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... ≥ n: four a doubling from 16 on.

    Example:
      >>> [close_length(n) for n in (1, 9, 17, 512, 513)]
      [8, 10, 20, 512, 640]
    """
    return _stepped(max(n, SHORTEST), 4)


def close_rows(n: int) -> int:
    """The smallest of 2, 4, 6, ..., 16, 18, 20, ..., 32, 36, 40, ... ≥ n: even, eight a doubling from 16 on.

    Example:
      >>> [close_rows(n) for n in (1, 8, 15, 17, 33)]
      [2, 8, 16, 18, 36]
    """
    return _stepped(max(n, 2), 8)


def coarse_length(n: int) -> int:
    """The smallest power of two ≥ n, and ≥ 128."""
    return max(SHORTEST_COARSE, 1 << (n - 1).bit_length())


def coarse_rows(n: int) -> int:
    """The smallest power of four ≥ n, and ≥ 4: few programs, and always even."""
    rows = FEWEST_ROWS_COARSE
    while rows < n:
        rows *= 4
    return rows


def bucket_function(buckets: Buckets, what: str) -> Callable[[int], int]:
    """The function from a size to the padded one, of sizes or of a function.

    Raises:
      TypeError: it is neither. The function raises ValueError where no size is large enough.
    """
    if callable(buckets):
        return buckets
    if not isinstance(buckets, Sequence) or not buckets:
        raise TypeError(f"{what}_buckets is a sequence of sizes or a function, got {buckets!r}")
    sizes = sorted(buckets)

    def next_size(n: int) -> int:
        for size in sizes:
            if size >= n:
                return size
        raise ValueError(f"{n} does not fit into the largest {what} bucket, {sizes[-1]}")

    return next_size


def padded(bucket: Callable[[int], int], n: int) -> int:
    """The size that a bucket function gives for n, if it holds n."""
    size = bucket(n)
    if size < n:
        raise ValueError(f"a bucket of {size} does not hold {n}")
    return size


def _stepped(n: int, steps: int) -> int:
    """n rounded up to an even number of which there are so many between a power of two and the next."""
    below = 1 << (n - 1).bit_length() - 1  # the power of two below n
    step = max(2, below // steps)
    return -(-n // step) * step
