"""Terms on what a model believes: its distribution over tokens, or a sample of it."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import as_token_batch
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    largest,
    log_probabilities,
    not_infinite,
    plogp_ratio,
    real_values,
    reduce_tokens,
)
from jaxreg.terms.term import Source, needs, read_like, term


@term
class Entropy:
    """Entropy ``H = −Σ p·log p`` over the last axis, in nats (Shannon 1948).

    Of logits or logprobs [B, T, V] it is exact (they are normalised first); of sampled-token
    logprobs [B, T] it is the estimator −lp.

    Args:
      mode: ``"minimize"`` adds +H to the loss (the model is made surer), ``"maximize"`` adds −H.
      temperature: logits are divided by it; [B, T, V] only.
      normalize: divide by log V, so that H is within 0 … 1; [B, T, V] only.
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean entropy a token, and ``perplexity``, exp of it.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.Entropy()(jnp.zeros((1, 1, 4)), {})
      >>> round(value.item(), 4)  # log 4
      1.3863
    """

    mode: Literal["minimize", "maximize"] = "minimize"
    temperature: float = 1.0
    normalize: bool = False
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.mode, ("minimize", "maximize"), "Entropy", "mode")
        check_choice(self.reduction, REDUCTIONS, "Entropy", "reduction")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Entropy: temperature is positive, got {self.temperature!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The entropy of x [B, T, V], or its estimate of x [B, T]."""
        tokens = as_token_batch(batch, x, "Entropy")
        values = real_values(tokens, x, "Entropy")
        if values.ndim == 2:
            if self.temperature != 1 or self.normalize:
                raise ValueError(
                    "Entropy: temperature and normalize need whole distributions [B, T, V], got "
                    f"sampled-token logprobs of shape {values.shape}"
                )
            entropy = -values
        else:
            log_p = log_probabilities(values, self.temperature)
            entropy = -jnp.sum(plogp_ratio(log_p, jnp.zeros_like(log_p)), axis=-1)
        mean = tokens.mean(entropy)
        if self.normalize:
            entropy = entropy / math.log(max(values.shape[-1], 2))
        loss = reduce_tokens(tokens, entropy, self.reduction)
        return (loss if self.mode == "minimize" else -loss), {
            "mean": mean,
            "perplexity": jnp.exp(mean),
        }


@term
class KL:
    """Kullback–Leibler divergence to a reference, in nats; p is the model.

    Of logits or logprobs [B, T, V] and a reference of that shape it is exact: forward
    ``Σ p·(log p − log q)``, reverse ``Σ q·(log q − log p)``, symmetric the mean of both. Of
    sampled-token logprobs [B, T] it is an estimator (Schulman 2020), with ``d = ref − lp``:
    ``k1 = −d``, ``k2 = ½d²``, ``k3 = exp(d) − d − 1``.

    Args:
      reference: the reference's logprobs (or logits), of the shape of x: a name in the batch, an array,
        or a function of the batch. No gradient.
      direction: ``"forward"`` or ``"reverse"``; [B, T, V] only.
      symmetric: the mean of both directions; [B, T, V] only.
      estimator: ``"k1"``, ``"k2"`` or ``"k3"``; [B, T] only.
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` a token.

    Where only one of the two probabilities is 0 and the divergence is infinite the value is +inf,
    and that entry's gradient is 0, never NaN.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"ref_logprobs": jnp.array([[-1.0, -2.0]])}
      >>> jr.regularizers.KL(estimator="k2")(jnp.array([[-1.0, -4.0]]), batch)[0].item()
      1.0
    """

    reference: Source = "ref_logprobs"
    direction: Literal["forward", "reverse"] = "forward"
    symmetric: bool = False
    estimator: Literal["k1", "k2", "k3"] = "k3"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.direction, ("forward", "reverse"), "KL", "direction")
        check_choice(self.estimator, ("k1", "k2", "k3"), "KL", "estimator")
        check_choice(self.reduction, REDUCTIONS, "KL", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The divergence of x from the reference."""
        tokens = as_token_batch(batch, x, "KL")
        values = real_values(tokens, x, "KL")
        reference = read_like(self.reference, tokens, values.shape, "KL", "the reference")
        divergence = self._sampled(values, reference) if x.ndim == 2 else self._exact(values, reference)
        metrics = {"mean": tokens.mean(divergence), "max": largest(tokens, divergence)}
        return reduce_tokens(tokens, divergence, self.reduction), metrics

    def _exact(self, x: Array, reference: Array) -> Array:
        log_p, log_q = log_probabilities(x), log_probabilities(reference)
        forward = jnp.sum(plogp_ratio(log_p, log_q), axis=-1)
        if self.direction == "forward" and not self.symmetric:
            return forward
        reverse = jnp.sum(plogp_ratio(log_q, log_p), axis=-1)
        return 0.5 * (forward + reverse) if self.symmetric else reverse

    def _sampled(self, logprobs: Array, reference: Array) -> Array:
        finite = not_infinite(logprobs) & not_infinite(reference)
        d = jnp.where(finite, reference, 0.0) - jnp.where(finite, logprobs, 0.0)
        limit = jnp.full_like(d, jnp.inf)
        if self.estimator == "k1":
            divergence, limit = -d, jnp.where(jnp.isneginf(reference), limit, -limit)
        elif self.estimator == "k2":
            divergence = 0.5 * d * d
        else:
            divergence = jnp.expm1(d) - d
        both_zero = jnp.isneginf(logprobs) & jnp.isneginf(reference)
        return jnp.where(finite, divergence, jnp.where(both_zero, 0.0, limit))


@term
class ZLoss:
    """z-loss: the mean of ``logsumexp(logits)²``, which keeps logits from drifting (PaLM, 2022).

    Args:
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``log_z``, the mean of logsumexp.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, _ = jr.regularizers.ZLoss()(jnp.zeros((1, 1, 4)), {})
      >>> round(value.item(), 4)  # (log 4)²
      1.9218
    """

    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "ZLoss", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of logits x [B, T, V]."""
        x = needs(x, 3, "ZLoss", "logits [B, T, V]")
        tokens = as_token_batch(batch, x, "ZLoss")
        log_z = jax.nn.logsumexp(real_values(tokens, x, "ZLoss"), axis=-1)
        return reduce_tokens(tokens, jnp.square(log_z), self.reduction), {"log_z": tokens.mean(log_z)}


@term
class JS:
    """Jensen–Shannon divergence ``½KL(p‖m) + ½KL(q‖m)``, m = (p + q)/2, at most log 2 (Lin 1991).

    Args:
      reference: logits or logprobs [B, T, V], of the shape of x: a name in the batch, an array, or a
        function of the batch. No gradient.
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` and ``max`` a token, in nats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[[0.0, -jnp.inf]]])
      >>> value, _ = jr.regularizers.JS(reference=x[..., ::-1])(x, {})
      >>> round(value.item(), 4)  # log 2: nothing in common
      0.6931
    """

    reference: Source = "ref_logprobs"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "JS", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The divergence of x [B, T, V] from the reference."""
        x = needs(x, 3, "JS", "whole distributions, logits or logprobs [B, T, V]")
        tokens = as_token_batch(batch, x, "JS")
        reference = read_like(self.reference, tokens, x.shape, "JS", "the reference")
        log_p = log_probabilities(real_values(tokens, x, "JS"))
        log_q = log_probabilities(reference)
        # logaddexp has NaN for a derivative where both are -inf: there nothing is to be added.
        some = not_infinite(log_p) | not_infinite(log_q)
        middle = jnp.logaddexp(jnp.where(some, log_p, 0.0), jnp.where(some, log_q, 0.0)) - math.log(2)
        middle = jnp.where(some, middle, -jnp.inf)
        halves = plogp_ratio(log_p, middle) + plogp_ratio(log_q, middle)
        divergence = jnp.sum(0.5 * halves, axis=-1)
        metrics = {
            "mean": tokens.mean(divergence),
            "max": largest(tokens, divergence),
        }
        return reduce_tokens(tokens, divergence, self.reduction), metrics


@term
class ConfidencePenalty:
    """Confidence penalty ``−H(p)`` of logits or logprobs [B, T, V] (Pereyra et al. 2017).

    Args:
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

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
        """The penalty of x [B, T, V]."""
        x = needs(x, 3, "ConfidencePenalty", "whole distributions, logits or logprobs [B, T, V]")
        tokens = as_token_batch(batch, x, "ConfidencePenalty")
        log_p = log_probabilities(real_values(tokens, x, "ConfidencePenalty"))
        negative = jnp.sum(plogp_ratio(log_p, jnp.zeros_like(log_p)), axis=-1)
        metrics = {
            "entropy": -tokens.mean(negative),
            "confidence": tokens.mean(jnp.exp(jnp.max(log_p, axis=-1))),
        }
        return reduce_tokens(tokens, negative, self.reduction), metrics


@term
class LabelSmoothing:
    """Cross-entropy to the uniform distribution, ``−(1/V) Σ log p`` (Szegedy et al. 2016).

    With a base loss that is the cross-entropy to the targets, a weight of ε/(1 − ε) here gives label
    smoothing by ε, up to the factor 1/(1 − ε) on the whole.

    Args:
      reduction: ``"token_mean"``, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean a token in nats. A token of probability 0 makes the value +inf and gets
    no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> round(jr.regularizers.LabelSmoothing()(jnp.zeros((1, 1, 4)), {})[0].item(), 4)
      1.3863
    """

    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "LabelSmoothing", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T, V]."""
        x = needs(x, 3, "LabelSmoothing", "whole distributions, logits or logprobs [B, T, V]")
        tokens = as_token_batch(batch, x, "LabelSmoothing")
        log_p = log_probabilities(real_values(tokens, x, "LabelSmoothing"))
        finite = not_infinite(log_p)
        smoothing = jnp.mean(jnp.where(finite, -jnp.where(finite, log_p, 0.0), jnp.inf), axis=-1)
        return reduce_tokens(tokens, smoothing, self.reduction), {"mean": tokens.mean(smoothing)}
