"""Penalties on every value of x by itself."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.terms.extremes import largest
from jaxreg.terms.inputs import check_weights
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    not_infinite,
    real_values,
    reduce_tokens,
    refuse_part,
)
from jaxreg.terms.term import term


@term
class L1:
    """L1 penalty ``λ |x|`` a value (Tibshirani 1996).

    Args:
      target: of what: ``"logprobs"``, x itself; ``"probs"``, exp(x); or the name of a field, where the
        outputs are a mapping.
      strength: λ, **1**; on top of the term's weight.
      reduction: **"token_mean"** (over every value), ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` of the absolute values. The subgradient at 0 is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.L1()(jnp.array([[-1.0, -2.0]]), {})[0].item()
      1.5
    """

    metric_kinds: ClassVar = Kinds("sum", max="max")
    target: str = "logprobs"
    strength: float = 1.0
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        _check(self.strength, self.reduction, "L1")

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K]."""
        tokens, values = _values(x, batch, self.target, "L1")
        size = jnp.abs(values)
        metrics = {"mean": tokens.mean(size), "max": largest(tokens, size)}
        return self.strength * reduce_tokens(tokens, size, self.reduction), metrics


@term
class L2:
    """L2 penalty ``λ clip(x − c)²`` a value (Hoerl & Kennard 1970).

    Args:
      target: as in `L1`.
      strength: λ, **1**; on top of the term's weight.
      center: **None**, a number, or ``"mean"``, the mean of all finite values that count.
      clip: **None**, or a positive number: deviations are clipped to [−clip, clip], after centring, and
        have no gradient beyond (and all of it on the edge).
      reduction: **"token_mean"** (over every value), ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``rms``, the root mean square of the deviations. An infinite value counts as +inf (as
    clip² where there is a clip) and has no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.L2(center="mean")(jnp.array([[1.0, 3.0]]), {})[0].item()
      1.0
    """

    metric_kinds: ClassVar = Kinds("sum", rms="root")
    target: str = "logprobs"
    strength: float = 1.0
    center: float | Literal["mean"] | None = None
    clip: float | None = None
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if isinstance(self.center, str):
            check_choice(self.center, ("mean",), "L2", "center, where it is a string,")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"L2: clip is a positive number or None, got {self.clip!r}")
        _check(self.strength, self.reduction, "L2")

    @property
    def additive(self) -> bool:
        """Whether the parts of a batch add up to the whole: unless it is centred on the batch's own mean."""
        return self.center != "mean"

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K]."""
        tokens, values = _values(x, batch, self.target, "L2")
        finite = not_infinite(values)
        values = jnp.where(finite, values, 0.0)
        if isinstance(self.center, str):
            refuse_part(
                tokens, "L2", "center='mean' is the mean of the whole batch", "give center= a number, or None"
            )
            counted = tokens.mean(finite.astype(values.dtype))
            values = values - tokens.mean(values) / jnp.where(counted == 0, 1.0, counted)
        elif self.center is not None:
            values = values - self.center
        if self.clip is not None:
            # A choice, not jnp.clip, which halves the gradient on the edge.
            values = jnp.where(jnp.abs(values) > self.clip, jnp.sign(values) * self.clip, values)
        limit = jnp.inf if self.clip is None else self.clip**2
        squares = jnp.where(finite, jnp.square(values), limit)
        mean = tokens.mean(squares)
        # A part's own may be below 0 where weights are, though the whole's is not.
        part = tokens.totals is not None
        metrics = {"rms": jnp.sign(mean) * jnp.sqrt(jnp.abs(mean)) if part else jnp.sqrt(mean)}
        return self.strength * reduce_tokens(tokens, squares, self.reduction), metrics


@term
class ElasticNet:
    """Elastic net ``λ (α |x| + (1 − α) x²)`` a value (Zou & Hastie 2005).

    Args:
      target, strength, reduction: as in `L1`.
      alpha: α, from 0 (all L2) to 1 (all L1), **0.5**.

    Metrics: ``l1`` and ``l2``, the two means. The subgradient at 0 is 0.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> jr.regularizers.ElasticNet()(jnp.array([[-1.0, -2.0]]), {})[0].item()
      2.0
    """

    target: str = "logprobs"
    strength: float = 1.0
    alpha: float = 0.5
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"ElasticNet: alpha is within 0 … 1, got {self.alpha!r}")
        _check(self.strength, self.reduction, "ElasticNet")

    def __call__(self, x: PyTree, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K]."""
        tokens, values = _values(x, batch, self.target, "ElasticNet")
        size = jnp.abs(values)
        squares = jnp.square(size)
        both = self.alpha * size + (1 - self.alpha) * squares
        metrics = {"l1": tokens.mean(size), "l2": tokens.mean(squares)}
        return self.strength * reduce_tokens(tokens, both, self.reduction), metrics


def _values(x: PyTree, batch: PyTree, target: str, who: str) -> tuple[TokenBatch, Array]:
    """The batch, and what the target names."""
    if target not in ("logprobs", "probs"):
        if not hasattr(x, "keys"):
            raise TypeError(
                f"{who}: target={target!r} names a field of the outputs, which are no mapping but "
                f"{type(x).__name__}; 'logprobs' means x itself, 'probs' exp(x)"
            )
        if target not in x:
            raise KeyError(f"{who}: the outputs have no field {target!r}; they have {sorted(x)}")
        x = x[target]
    tokens = as_token_batch(batch, x, who)
    check_weights(tokens, jnp.shape(x), who)
    values = real_values(tokens, x, who)
    return tokens, jnp.exp(values) if target == "probs" else values


def _check(strength: float, reduction: str, who: str) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"{who}: strength is a finite number ≥ 0, got {strength!r}")
    check_choice(reduction, REDUCTIONS, who, "reduction")
