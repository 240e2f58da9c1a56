"""Terms on what a model believes: its distribution over tokens, or a sample of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg._reductions import (
    REDUCTIONS,
    Reduction,
    array_from,
    check_choice,
    largest,
    log_probabilities,
    plogp_ratio,
    real_values,
    reduce_tokens,
)
from jaxreg.batch import as_token_batch
from jaxreg.spec import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL:
    """Kullback–Leibler divergence to a reference, in nats; p is the model.

    Of logits or logprobs [B, T, V] and a reference of that shape it is exact: forward
    ``Σ p·(log p − log q)``, reverse ``Σ q·(log q − log p)``, symmetric the mean of both. Of
    sampled-token logprobs [B, T] it is an estimator (Schulman 2020), with ``d = ref − lp``:
    ``k1 = −d``, ``k2 = ½d²``, ``k3 = exp(d) − d − 1``.

    Args:
      reference: the name of the batch's array with the reference's logprobs (or logits), of the
        shape of x. It gets no gradient.
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

    reference: str = "ref_logprobs"
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
        reference = jax.lax.stop_gradient(array_from(tokens, self.reference, values.shape, "KL"))
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
        finite = jnp.isfinite(logprobs) & jnp.isfinite(reference)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
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
        if jnp.ndim(x) != 3:
            raise ValueError(f"ZLoss: expected logits [B, T, V], got {jnp.shape(x)}")
        tokens = as_token_batch(batch, x, "ZLoss")
        log_z = jax.nn.logsumexp(real_values(tokens, x, "ZLoss"), axis=-1)
        return reduce_tokens(tokens, jnp.square(log_z), self.reduction), {"log_z": tokens.mean(log_z)}
