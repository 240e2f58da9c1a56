"""Penalties on every value of x by itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxreg._reductions import REDUCTIONS, Reduction, check_choice, largest, real_values, reduce_tokens
from jaxreg.batch import as_token_batch
from jaxreg.spec import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1:
    """L1 penalty ``Σ |x|`` (Tibshirani 1996), of logprobs, or of probabilities.

    Args:
      of: ``"x"``, the values themselves, or ``"probs"``, exp(x).
      reduction: ``"token_sum"``, ``"token_mean"`` (over every value) or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` of the absolute values. The subgradient at 0 is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.L1()(jnp.array([[-1.0, -2.0]]), {})[0].item()
      3.0
    """

    of: Literal["x", "probs"] = "x"
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        check_choice(self.of, ("x", "probs"), "L1", "of")
        check_choice(self.reduction, REDUCTIONS, "L1", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K]."""
        tokens = as_token_batch(batch, x, "L1")
        values = real_values(tokens, x, "L1")
        size = jnp.abs(values) if self.of == "x" else jnp.exp(values)
        metrics = {"mean": tokens.mean(size), "max": largest(tokens, size)}
        return reduce_tokens(tokens, size, self.reduction), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2:
    """L2 penalty ``Σ clip(x − c)²`` (Hoerl & Kennard 1970).

    Args:
      center: None, a number, or ``"mean"``, the mean of all finite values that count.
      clip: None, or a positive number: deviations are clipped to [−clip, clip], after centring, and
        have no gradient beyond.
      reduction: ``"token_sum"``, ``"token_mean"`` (over every value) or ``"datum_mean"``.

    Metrics: ``rms``, the root mean square of the deviations. An infinite value counts as +inf (as
    clip² where there is a clip) and has no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.L2(center="mean")(jnp.array([[1.0, 3.0]]), {})[0].item()
      2.0
    """

    center: float | Literal["mean"] | None = None
    clip: float | None = None
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        if isinstance(self.center, str):
            check_choice(self.center, ("mean",), "L2", "center, where it is a string,")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"L2: clip is a positive number or None, got {self.clip!r}")
        check_choice(self.reduction, REDUCTIONS, "L2", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K]."""
        tokens = as_token_batch(batch, x, "L2")
        values = real_values(tokens, x, "L2")
        finite = jnp.isfinite(values)
        values = jnp.where(finite, values, 0.0)
        if isinstance(self.center, str):
            counted = tokens.mean(finite.astype(values.dtype))
            values = values - tokens.mean(values) / jnp.where(counted == 0, 1.0, counted)
        elif self.center is not None:
            values = values - self.center
        if self.clip is not None:
            values = jnp.clip(values, -self.clip, self.clip)
        limit = jnp.inf if self.clip is None else self.clip**2
        squares = jnp.where(finite, jnp.square(values), limit)
        metrics = {"rms": jnp.sqrt(tokens.mean(squares))}
        return reduce_tokens(tokens, squares, self.reduction), metrics
