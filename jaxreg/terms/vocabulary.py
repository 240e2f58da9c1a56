"""Words that cannot be: how a vocabulary is padded to a round size."""

from __future__ import annotations

from jaxreg.base.types import Array

_LOG_SMALLEST = -104.0  # below it exp() is 0 in float32, the smallest subnormal number included


def possible(log_p: Array) -> Array:
    """Where a normalised log-probability is of a word that can be said: its probability in float32 is not 0.

    Padding by −∞, and by −1e9, −1e4 or another number that stands for it, is below; so is a word that the
    model gives less than 1e-45. NaN counts as possible: it has to be seen.
    """
    return ~(log_p < _LOG_SMALLEST)
