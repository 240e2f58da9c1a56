"""Policy-gradient losses on sampled-token log-probabilities.

In all of them ``lp`` is x [B, T], ``s`` the sampler's log-probabilities and ``A`` the advantages, both read
from the batch ([B, T], or [B] for one number a datum), and ``r = exp(lp − s)``. A token whose log-ratio is
not finite (the learner or the sampler gave it probability 0) is left out: it adds 0 and gets no gradient.

r saturates where it, or r·A·w, is no number of the dtype, above exp(88) in float32, and has no gradient
beyond; values and metrics are finite for every finite log-ratio.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.inputs import INPUTS, Inputs, read_folded, sampled
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, not_infinite, reduce_tokens
from jaxreg.terms.ratios import ratio_metrics, ratio_of, reduce_large
from jaxreg.terms.term import Source, term

Result = tuple[Array, dict[str, Array]]


class Read(NamedTuple):
    """What a policy loss is a function of, all [B, T]."""

    tokens: TokenBatch
    logprobs: Array  # 0 where left out
    log_ratio: Array  # lp − s, 0 where it is not finite
    counted: Array  # where it is finite
    advantages: Array

    def ratio(self, log_ratio: Array) -> Array:
        """exp(log_ratio), saturated where it, or what it is multiplied by, leaves the dtype's range."""
        return ratio_of(log_ratio, self.advantages * self.tokens.weights.astype(log_ratio.dtype))

    def reduce(self, loss: Array, reduction: Reduction) -> Array:
        """The reduction of a loss a token, of those whose ratio is finite."""
        return reduce_large(self.tokens, jnp.where(self.counted, loss, 0.0), reduction)


@term
class PolicyLoss:
    """What they all read."""

    metric_kinds: ClassVar = Kinds("sum", ratio_max="max", ratio_min="min")
    sampler: Source = "logprobs"
    advantages: Source = "advantages"
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.inputs, INPUTS, type(self).__name__, "inputs")
        check_choice(self.reduction, REDUCTIONS, type(self).__name__, "reduction")

    def _read(self, x: Array, batch: PyTree) -> Read:
        who = type(self).__name__
        tokens, logprobs = sampled(batch, x, who, self.inputs, self.targets)
        shape = x.shape if self.inputs == "logprobs" else x.shape[:-1]
        sampler = read_folded(self.sampler, tokens, shape, who, "the sampler's logprobs")
        advantages = read_folded(self.advantages, tokens, shape, who, "advantages", per_datum=True)
        counted = not_infinite(logprobs) & not_infinite(sampler)
        logprobs = jnp.where(counted, logprobs, 0.0)
        return Read(tokens, logprobs, logprobs - jnp.where(counted, sampler, 0.0), counted, advantages)


@term
class ImportanceSampling(PolicyLoss):
    """Importance-weighted policy gradient ``−r·A`` a token; as a sum, the APIs' ``importance_sampling``.

    On tokens that the sampler drew its expected gradient is that of −E[A] under the learner, with what came
    before each token as the sampler drew it.

    Args:
      sampler: the sampler's logprobs, [B, T]: a name in the batch, an array, or a function of the batch.
      advantages: [B, T] or [B]; likewise.
      inputs: what x is: **"logprobs"** of the sampled tokens [B, T], or ``"logits"`` [..., V].
      targets: for ``"logits"``, the name of the integer array of sampled tokens.
      reduction: **"token_mean"**, ``"token_sum"`` (the remote APIs' own) or ``"datum_mean"``.

    Metrics: ``ratio_mean``, ``ratio_max`` and ``ratio_min`` of r over the tokens that count; ``kl``, the k3
    estimate of KL(sampler ‖ learner) in nats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0, -2.0]]), "advantages": jnp.array([[1.0, -3.0]])}
      >>> jr.losses.ImportanceSampling()(jnp.array([[-1.0, -2.0]]), batch)[0].item()
      1.0
    """

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], or of logits."""
        read = self._read(x, batch)
        loss = -read.ratio(read.log_ratio) * read.advantages
        return read.reduce(loss, self.reduction), ratio_metrics(read.tokens, read.log_ratio, read.counted)


@term
class PPO(PolicyLoss):
    """Clipped surrogate ``−min(r·A, clip(r, low, high)·A)`` a token (Schulman et al. 2017).

    With a dual clip c (Ye et al. 2020), where A < 0: ``−max(min(r·A, clip(r, low, high)·A), c·A)``.

    The gradient is that of r·A where r is on the edge of the range itself, and 0 where the clipped side is
    the smaller one: so on-policy (r = 1) a range that begins or ends at 1 takes nothing away.

    Args:
      low, high: the clip range of r, **0.8** and **1.2**.
      dual_clip: c > 1 (often 3), or **None**. Without it one token with A < 0 and a large r, which the clip
        does not reach, can outweigh the batch.
      sampler, advantages, inputs, targets, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``, the share of tokens whose clipped side is the smaller one; with a dual clip
    ``dual_clip_fraction``, the share that it stops; ``ratio_mean``, ``ratio_max``, ``ratio_min``; ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-2.0, -2.0]]), "advantages": jnp.array([[1.0, -1.0]])}
      >>> loss, metrics = jr.losses.PPO()(jnp.array([[-1.0, -2.0]]), batch)
      >>> round(loss.item(), 3), metrics["clip_fraction"].item()
      (-0.1, 0.5)
    """

    low: float = 0.8
    high: float = 1.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_range(self.low, self.high, "PPO")
        if self.dual_clip is not None and not (math.isfinite(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"PPO: dual_clip is a number above 1, or None; got {self.dual_clip!r}")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], or of logits."""
        read = self._read(x, batch)
        ratio = read.ratio(read.log_ratio)
        loss, clipped = clipped_loss(ratio, read.advantages, self.low, self.high)
        metrics = {"clip_fraction": read.tokens.mean(clipped & read.counted)}
        if self.dual_clip is not None:
            stopped = (read.advantages < 0) & (ratio > self.dual_clip)
            loss = jnp.where(stopped, -self.dual_clip * read.advantages, loss)
            metrics["dual_clip_fraction"] = read.tokens.mean(stopped & read.counted)
        metrics |= ratio_metrics(read.tokens, read.log_ratio, read.counted)
        return read.reduce(loss, self.reduction), metrics


@term
class CISPO(PolicyLoss):
    """Clipped importance weights ``−sg(clip(r, low, high))·lp·A`` a token (MiniMax-M1, 2025).

    Unlike `PPO`, clipping never takes a token's gradient away: sg, stop-gradient, is on the weight only. The
    gradient is that of `ImportanceSampling` with r clipped; the value is no objective.

    Args:
      low, high: the clip range of r, **0** and **4** (other servers: 0.8 and 1.2).
      sampler, advantages, inputs, targets, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``, the share of tokens with r outside of the range; ``ratio_mean``,
    ``ratio_max``, ``ratio_min``; ``kl``.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0]]), "advantages": jnp.array([[2.0]])}
      >>> jr.losses.CISPO()(jnp.array([[-1.0]]), batch)[0].item()
      2.0
    """

    low: float = 0.0
    high: float = 4.0

    def __post_init__(self) -> None:
        check_range(self.low, self.high, "CISPO")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], or of logits."""
        read = self._read(x, batch)
        ratio = jax.lax.stop_gradient(ratio_of(read.log_ratio))
        loss = -jnp.clip(ratio, self.low, self.high) * read.logprobs * read.advantages
        outside = ((ratio < self.low) | (ratio > self.high)) & read.counted
        metrics = {"clip_fraction": read.tokens.mean(outside)}
        metrics |= ratio_metrics(read.tokens, read.log_ratio, read.counted)
        return read.reduce(loss, self.reduction), metrics


@term
class DRO(PolicyLoss):
    """Direct reward optimization ``−(lp·A − ½β(lp − s)²)`` a token (Richemond et al. 2024).

    A regression on given tokens: off-policy its gradient is that of this sum, not of an expectation under the
    learner.

    Args:
      beta: strength of the pull to the sampler, **0.05**.
      sampler, advantages, inputs, targets, reduction: as in `ImportanceSampling`.

    Metrics: ``penalty``, the mean of ½β(lp − s)²; ``ratio_mean``, ``ratio_max``, ``ratio_min``; ``kl``.

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
        """The loss of x [B, T], or of logits."""
        read = self._read(x, batch)
        penalty = 0.5 * self.beta * jnp.square(read.log_ratio)
        loss = penalty - read.logprobs * read.advantages
        metrics = {"penalty": read.tokens.mean(penalty)}
        metrics |= ratio_metrics(read.tokens, read.log_ratio, read.counted)
        return reduce_tokens(read.tokens, jnp.where(read.counted, loss, 0.0), self.reduction), metrics


def clipped_loss(ratio: Array, advantages: Array, low: float, high: float) -> tuple[Array, Array]:
    """−min(r·A, clip(r)·A), and where the clipped side is the smaller one.

    By a choice, not by ``minimum`` and ``clip``: each of them halves the gradient of a tie, and on the edge
    of the range both are tied.
    """
    clipped = jnp.where(advantages < 0, ratio < low, (ratio > high) & (advantages > 0))
    bound = jnp.where(ratio < low, low, high).astype(ratio.dtype)
    return -jnp.where(clipped, bound, ratio) * advantages, clipped


def check_range(low: float, high: float, who: str) -> None:
    """Refuse a clip range that does not hold 1."""
    if not (0 <= low <= 1 <= high and math.isfinite(high)):
        raise ValueError(
            f"{who}: a clip range is not negative and holds 1: 0 ≤ low ≤ 1 ≤ high; got {low!r}, {high!r}"
        )
