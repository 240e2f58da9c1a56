"""Policy-gradient losses on sampled-token log-probabilities.

In all of them ``lp`` is x [B, T], ``s`` the sampler's log-probabilities and ``A`` the advantages, both
read from the batch ([B, T], or [B] for one number a datum), and ``r = exp(lp − s)``. A token whose log-ratio
is not finite (the learner or the sampler gave it probability 0) is left out: it adds 0 and gets no gradient.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    logprob_values,
    not_infinite,
    reduce_tokens,
)
from jaxreg.terms.term import Source, needs, read_like, term

Result = tuple[Array, dict[str, Array]]


@term
class _PolicyLoss:
    """What they all read."""

    sampler: Source = "logprobs"
    advantages: Source = "advantages"
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, type(self).__name__, "reduction")

    def _read(
        self, x: Array, batch: PyTree, *, by_mask: bool = False
    ) -> tuple[TokenBatch, Array, Array, Array, Array]:
        """The batch, lp, lp − s (0 where it is not finite), where it is finite, and A.

        By the mask, lp and s are of every real token, whatever its weight.
        """
        who = type(self).__name__
        x = needs(x, 2, who, "sampled-token logprobs [B, T]")
        tokens = as_token_batch(batch, x, who)
        logprobs = logprob_values(tokens, x, who, by_mask=by_mask)
        sampler = read_like(self.sampler, tokens, x.shape, who, "the sampler's logprobs", by_mask=by_mask)
        advantages = read_like(self.advantages, tokens, x.shape, who, "advantages", per_datum=True)
        counted = not_infinite(logprobs) & not_infinite(sampler)
        log_ratio = jnp.where(counted, logprobs, 0.0) - jnp.where(counted, sampler, 0.0)
        return tokens, logprobs, log_ratio, counted, advantages


@term
class ImportanceSampling(_PolicyLoss):
    """Importance-weighted policy gradient ``−Σ r·A``, the remote APIs' ``importance_sampling``.

    Args:
      sampler: the sampler's logprobs, [B, T]: a name in the batch, an array, or a function of the batch.
      advantages: [B, T] or [B]; likewise.
      reduction: ``"token_sum"`` (the APIs' own), ``"token_mean"`` or ``"datum_mean"``.

    Metrics: ``ratio_mean``, the mean of r; ``kl``, the k3 estimate of KL(sampler ‖ learner) in nats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0, -2.0]]), "advantages": jnp.array([[1.0, -3.0]])}
      >>> jr.losses.ImportanceSampling()(jnp.array([[-1.0, -2.0]]), batch)[0].item()
      2.0
    """

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T]."""
        tokens, _, log_ratio, counted, advantages = self._read(x, batch)
        ratio = jnp.exp(log_ratio)
        loss = jnp.where(counted, -ratio * advantages, 0.0)
        return reduce_tokens(tokens, loss, self.reduction), _ratio_metrics(tokens, log_ratio)


@term
class PPO(_PolicyLoss):
    """Clipped surrogate ``−Σ min(r·A, clip(r, low, high)·A)`` (Schulman et al. 2017).

    Args:
      low, high: the clip range of r, **0.8** and **1.2**. Where the clipped side is the smaller one the
        gradient is 0.
      sampler, advantages, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``, the share of tokens whose clipped side is the smaller one; ``ratio_mean``;
    ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-2.0, -2.0]]), "advantages": jnp.array([[1.0, -1.0]])}
      >>> loss, metrics = jr.losses.PPO()(jnp.array([[-1.0, -2.0]]), batch)
      >>> round(loss.item(), 3), metrics["clip_fraction"].item()
      (-0.2, 0.5)
    """

    low: float = 0.8
    high: float = 1.2

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, "PPO")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T]."""
        tokens, _, log_ratio, counted, advantages = self._read(x, batch)
        loss, clipped = _clipped(jnp.exp(log_ratio), advantages, self.low, self.high)
        metrics = {"clip_fraction": tokens.mean(clipped & counted)} | _ratio_metrics(tokens, log_ratio)
        return reduce_tokens(tokens, jnp.where(counted, loss, 0.0), self.reduction), metrics


@term
class CISPO(_PolicyLoss):
    """Clipped importance weights ``−Σ sg(clip(r, low, high))·lp·A`` (MiniMax-M1, 2025).

    Unlike `PPO`, clipping never takes a token's gradient away: sg, stop-gradient, is on the weight only.

    Args:
      low, high: the clip range of r, **0** and **4** (other servers: 0.8 and 1.2).
      sampler, advantages, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``, the share of tokens with r outside of the range; ``ratio_mean``; ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0]]), "advantages": jnp.array([[2.0]])}
      >>> jr.losses.CISPO()(jnp.array([[-1.0]]), batch)[0].item()
      2.0
    """

    low: float = 0.0
    high: float = 4.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, "CISPO")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T]."""
        tokens, logprobs, log_ratio, counted, advantages = self._read(x, batch)
        ratio = jnp.exp(log_ratio)
        weight = jax.lax.stop_gradient(jnp.clip(ratio, self.low, self.high))
        loss = -weight * jnp.where(counted, logprobs, 0.0) * advantages
        outside = ((ratio < self.low) | (ratio > self.high)) & counted
        metrics = {"clip_fraction": tokens.mean(outside)} | _ratio_metrics(tokens, log_ratio)
        return reduce_tokens(tokens, loss, self.reduction), metrics


@term
class DRO(_PolicyLoss):
    """Direct reward optimization ``−Σ (lp·A − ½β(lp − s)²)`` (Richemond et al. 2024).

    Args:
      beta: strength of the pull to the sampler, **0.05**.
      sampler, advantages, reduction: as in `ImportanceSampling`.

    Metrics: ``penalty``, the mean of ½β(lp − s)²; ``ratio_mean``; ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0]]), "advantages": jnp.array([[2.0]])}
      >>> round(jr.losses.DRO()(jnp.array([[-3.0]]), batch)[0].item(), 4)
      6.1
    """

    beta: float = 0.05

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"DRO: beta is a finite number ≥ 0, got {self.beta!r}")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T]."""
        tokens, logprobs, log_ratio, counted, advantages = self._read(x, batch)
        penalty = 0.5 * self.beta * jnp.square(log_ratio)
        loss = penalty - jnp.where(counted, logprobs, 0.0) * advantages
        metrics = {"penalty": tokens.mean(penalty)} | _ratio_metrics(tokens, log_ratio)
        return reduce_tokens(tokens, jnp.where(counted, loss, 0.0), self.reduction), metrics


@term
class GSPO(_PolicyLoss):
    """`PPO` with one ratio a sequence, ``R = exp(mean over its tokens of lp − s)`` (Zheng et al. 2025).

    The mean is over the mask, not the weights: every token of the answer counts alike in R.

    Args:
      low, high: the clip range of R, **0.8** and **1.2** (the paper's own range is far narrower).
      sampler, advantages, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``; ``ratio_mean``, the mean of R; ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0, -2.0]]), "advantages": jnp.array([1.0])}
      >>> jr.losses.GSPO()(jnp.array([[-1.0, -2.0]]), batch)[0].item()
      -2.0
    """

    low: float = 0.8
    high: float = 1.2

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, "GSPO")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T]."""
        tokens, _, log_ratio, counted, advantages = self._read(x, batch, by_mask=True)
        means = tokens.datum_means(log_ratio, weights=tokens.mask & counted)
        ratio = jnp.broadcast_to(jnp.exp(means)[:, None], log_ratio.shape)
        loss, clipped = _clipped(ratio, advantages, self.low, self.high)
        metrics = _ratio_metrics(tokens, log_ratio) | {
            "clip_fraction": tokens.mean(clipped & counted),
            "ratio_mean": tokens.mean(ratio),
        }
        return reduce_tokens(tokens, jnp.where(counted, loss, 0.0), self.reduction), metrics


def _clipped(ratio: Array, advantages: Array, low: float, high: float) -> tuple[Array, Array]:
    """−min(r·A, clip(r)·A), and where the clipped side is the smaller one."""
    plain, bounded = ratio * advantages, jnp.clip(ratio, low, high) * advantages
    return -jnp.minimum(plain, bounded), bounded < plain


def _ratio_metrics(tokens: TokenBatch, log_ratio: Array) -> dict[str, Array]:
    return {
        "ratio_mean": tokens.mean(jnp.exp(log_ratio)),
        "kl": tokens.mean(jnp.expm1(log_ratio) - log_ratio),
    }


def _check_range(low: float, high: float, who: str) -> None:
    if not (0 <= low <= 1 <= high and math.isfinite(high)):
        raise ValueError(
            f"{who}: a clip range is not negative and holds 1: 0 ≤ low ≤ 1 ≤ high; got {low!r}, {high!r}"
        )
