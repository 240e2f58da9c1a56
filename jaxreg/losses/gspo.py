"""A policy-gradient loss with one ratio a sequence."""

from __future__ import annotations

from jaxreg.base.types import Array, PyTree
from jaxreg.losses.policy import PolicyLoss, Result, check_range, clipped_loss
from jaxreg.terms.extremes import largest, smallest
from jaxreg.terms.masked import counts
from jaxreg.terms.ratios import mean_large, ratio_metrics
from jaxreg.terms.term import term


@term
class GSPO(PolicyLoss):
    """`PPO` with one ratio a sequence, ``R = exp(mean over its tokens of lp − s)`` (Zheng et al. 2025).

    The mean is over the tokens that count (real, and of a weight that is not 0; so not the prompt's), each of
    them alike, whatever its weight. The edges of the range are `PPO`'s.

    Args:
      low, high: the clip range of R, **0.8** and **1.2** (the paper's own range is far narrower).
      sampler, advantages, inputs, targets, reduction: as in `ImportanceSampling`.

    Metrics: ``clip_fraction``; ``ratio_mean``, ``ratio_max`` and ``ratio_min`` of R; ``kl``, of the tokens.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"logprobs": jnp.array([[-1.0, -2.0]]), "advantages": jnp.array([1.0])}
      >>> jr.losses.GSPO()(jnp.array([[-1.0, -2.0]]), batch)[0].item()
      -1.0
    """

    low: float = 0.8
    high: float = 1.2

    def __post_init__(self) -> None:
        check_range(self.low, self.high, "GSPO")
        super().__post_init__()

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], or of logits."""
        read = self._read(x, batch)
        tokens = read.tokens
        means = tokens.datum_means(read.log_ratio, weights=counts(tokens) & read.counted)
        ratio = read.ratio(tokens.spread(means))
        loss, clipped = clipped_loss(ratio, read.advantages, self.low, self.high)
        metrics = ratio_metrics(tokens, read.log_ratio, read.counted) | {
            "clip_fraction": tokens.mean(clipped & read.counted),
            "ratio_mean": mean_large(tokens, ratio),
            "ratio_max": largest(tokens, ratio, read.counted),
            "ratio_min": smallest(tokens, ratio, read.counted),
        }
        return read.reduce(loss, self.reduction), metrics
