"""What is real and what counts: the one rule that every reduction and every term goes by.

``mask`` says which tokens are real, a prompt's among them. ``weights`` that are not 0 say which count. A
token of weight 0 is context: no part of the answer. A datum without a token that counts is as if it were not
there.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def counted(mask: Any, weights: Any, shape: tuple[int, ...], xp: Any = jnp) -> Any:
    """Which numbers of an array [B], [B, T] or [B, T, ...] count: bool, to be broadcast to its shape.

    A datum counts if one of its tokens does; a token, if one of its weights is not 0. Where weights [B, T, K]
    are as many as the numbers, each number counts by its own.
    """
    weighty = weights != 0
    if weights.ndim == 3:
        if weights.shape == shape:
            return mask[..., None] & weighty
        weighty = xp.any(weighty, axis=-1)
    tokens = mask & weighty
    if len(shape) == 1:
        return xp.any(tokens, axis=1)
    return tokens.reshape(tokens.shape + (1,) * (len(shape) - 2))


def token_weights(weights: Any, mask: Any, xp: Any = jnp) -> Any:
    """Weights [B, T] or [B, T, K], 0 where the mask is False; the mask itself where there are none.

    Raises:
      ValueError: they have another shape.
    """
    if weights is None:
        return mask.astype(np.float32)
    if xp.ndim(weights) not in (2, 3) or xp.shape(weights)[:2] != mask.shape:
        raise ValueError(
            f"'weights' has one number a token ([T], or [T, K]): expected [B, T] or [B, T, K] with "
            f"(B, T) = {mask.shape}, got {xp.shape(weights)}"
        )
    real = mask if xp.ndim(weights) == 2 else mask[..., None]
    if not xp.issubdtype(weights.dtype, xp.floating):
        weights = weights.astype(np.float32)
    return xp.where(real, weights, xp.zeros((), weights.dtype))
