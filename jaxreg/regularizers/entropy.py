"""Terms on how sure a model is."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax.numpy as jnp

from jaxreg.base.kinds import Kinds
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.estimators import Gradient, check_gradient, estimated, off_policy
from jaxreg.terms.inputs import INPUTS, Inputs, distributions, kind_of, sampled
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    log_probabilities,
    plogp_ratio,
    reduce_tokens,
)
from jaxreg.terms.ratios import perplexity
from jaxreg.terms.term import Source, term
from jaxreg.terms.vocabulary import possible


@term
class Entropy:
    """Entropy ``H = −Σ p·log p`` over the last axis, in nats (Shannon 1948).

    Of logits or logprobs [B, T, V] (or [B, V], of a classifier) it is exact, with its own gradient; they are
    normalised first. Of sampled-token logprobs [B, T] it is the estimator −lp, with one of two gradients:

    - ``"score"``: −lp·∇lp. Over tokens drawn from the model it is the gradient of H, in expectation.
    - ``"pathwise"``: −∇lp. Over tokens drawn from the model it is 0 in expectation, so it does nothing but
      add noise; on given data it is the cross-entropy's, and ``"maximize"`` then lowers their likelihood.

    Args:
      mode: ``"minimize"`` adds +H to the loss (the model is made surer), ``"maximize"`` adds −H.
      inputs: what x is: ``"logprobs"`` of sampled tokens [B, T], or ``"logits"`` (or logprobs) of whole
        distributions [..., V]. **None**: the former for two axes, the latter for more.
      gradient: **"score"** or ``"pathwise"``; sampled tokens only.
      sampler: the logprobs [B, T] of whatever drew the tokens, where that is not the model itself: a name in
        the batch, an array, or a function of the batch. The gradient is then weighted by p/s. The value stays
        −lp.
      temperature: logits are divided by it; whole distributions only.
      normalize: divide by the logarithm of the number of possible words, so that H is within 0 … 1; whole
        distributions only. A word of probability 0 in float32 (logit −∞, −1e9) is not possible.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean entropy a token, and ``perplexity``, exp of it.

    Raises:
      ValueError: x of two axes that can be no logprobs of sampled tokens, and inputs does not say what it is
        (NaN, where the numbers are traced); an argument that the other kind of x has.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.Entropy()(jnp.zeros((1, 1, 4)), {})
      >>> round(value.item(), 4)  # log 4
      1.3863
      >>> value, _ = jr.regularizers.Entropy(inputs="logits")(jnp.zeros((1, 4)), {})  # a classifier's
      >>> round(value.item(), 4)
      1.3863
    """

    metric_kinds: ClassVar = Kinds("sum", perplexity=("exp", "mean"))
    mode: Literal["minimize", "maximize"] = "minimize"
    inputs: Inputs | None = None
    gradient: Gradient | None = None
    sampler: Source | None = None
    temperature: float = 1.0
    normalize: bool = False
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.mode, ("minimize", "maximize"), "Entropy", "mode")
        if self.inputs is not None:
            check_choice(self.inputs, INPUTS, "Entropy", "inputs")
        check_gradient(self.gradient, "Entropy")
        check_choice(self.reduction, REDUCTIONS, "Entropy", "reduction")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Entropy: temperature is positive, got {self.temperature!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The entropy of x [..., V], or its estimate of x [B, T]."""
        whole = kind_of(x, self.inputs, "Entropy") == "logits"
        tokens, entropy, scale = self._exact(x, batch) if whole else self._sampled(x, batch)
        mean = tokens.mean(entropy)
        loss = reduce_tokens(tokens, entropy if scale is None else entropy / scale, self.reduction)
        return (loss if self.mode == "minimize" else -loss), {
            "mean": mean,
            "perplexity": perplexity(mean),
        }

    def _exact(self, x: Array, batch: PyTree) -> tuple[TokenBatch, Array, Array | None]:
        if self.gradient is not None or self.sampler is not None:
            raise ValueError(
                f"Entropy: gradient and sampler are of sampled-token logprobs [B, T]; of whole distributions "
                f"{x.shape} the gradient is exact"
            )
        tokens, logits = distributions(batch, x, "Entropy")
        log_p = log_probabilities(logits, self.temperature)
        entropy = -jnp.sum(plogp_ratio(log_p, jnp.zeros_like(log_p)), axis=-1)
        if not self.normalize:
            return tokens, entropy, None
        words = jnp.sum(possible(log_p), axis=-1)
        return tokens, entropy, jnp.log(jnp.maximum(words, 2).astype(log_p.dtype))

    def _sampled(self, x: Array, batch: PyTree) -> tuple[TokenBatch, Array, Array | None]:
        if self.temperature != 1 or self.normalize:
            raise ValueError(
                "Entropy: temperature and normalize need whole distributions [B, T, V], got "
                f"sampled-token logprobs of shape {x.shape}"
            )
        tokens, logprobs = sampled(batch, x, "Entropy", "logprobs", "")
        off = off_policy(self.sampler, tokens, logprobs, x.shape, "Entropy")
        if self.gradient == "pathwise":
            if off is None:
                return tokens, -logprobs, None
            return tokens, estimated(-logprobs, logprobs, -jnp.ones_like(logprobs), off), None
        return tokens, estimated(-logprobs, logprobs, -logprobs, off), None


@term
class ConfidencePenalty:
    """Confidence penalty ``−H(p)`` of logits or logprobs [B, T, V], or [B, V] (Pereyra et al. 2017).

    Exact, of whole distributions, and so is its gradient.

    Args:
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``entropy``, its mean a token in nats; ``confidence``, the mean largest probability.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> round(jr.regularizers.ConfidencePenalty()(jnp.zeros((1, 1, 4)), {})[0].item(), 4)
      -1.3863
    """

    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "ConfidencePenalty", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [..., V]."""
        tokens, logits = distributions(batch, x, "ConfidencePenalty")
        log_p = log_probabilities(logits)
        negative = jnp.sum(plogp_ratio(log_p, jnp.zeros_like(log_p)), axis=-1)
        metrics = {
            "entropy": -tokens.mean(negative),
            "confidence": tokens.mean(jnp.exp(jnp.max(log_p, axis=-1))),
        }
        return reduce_tokens(tokens, negative, self.reduction), metrics
