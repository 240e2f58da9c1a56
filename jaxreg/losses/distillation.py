"""Losses on a teacher's top-K: x holds the model's logprobs of K given tokens at every place, [B, T, K]."""

from __future__ import annotations

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
    plogp_ratio,
    reduce_tokens,
)
from jaxreg.terms.term import Source, needs, read_like, term


@term
class ReverseKLTopK:
    """Reverse KL over K slots, ``Σ p̃·sg[log p̃ − log q̃]``, as a policy gradient (Gu et al. 2024).

    p̃ and q̃ are the model's and the teacher's probabilities, renormalised over the slots where the
    teacher's is not 0; the other slots are excluded. sg, stop-gradient: the gradient is that of the true
    divergence, since Σ p̃·∇log p̃ = 0.

    Args:
      reference: the teacher's logprobs [B, T, K]: a name in the batch, an array, or a function of it.
      reduction: ``"token_sum"``, ``"token_mean"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean divergence a token in nats; ``coverage``, the mean of Σ p over the slots.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.log(jnp.array([[[0.5, 0.25]]]))
      >>> loss, metrics = jr.losses.ReverseKLTopK()(x, {"teacher_logprobs": x})
      >>> abs(round(loss.item(), 6)), metrics["coverage"].item()
      (0.0, 0.75)
    """

    reference: Source = "teacher_logprobs"
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "ReverseKLTopK", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T, K]."""
        tokens, logprobs, teacher = _read(self.reference, x, batch, "ReverseKLTopK")
        counted = not_infinite(teacher)
        log_p = _renormalised(logprobs, counted)
        log_q = _renormalised(teacher, counted)
        live = counted & not_infinite(log_p)
        safe_p, safe_q = jnp.where(live, log_p, 0.0), jnp.where(live, log_q, 0.0)
        slots = jnp.where(live, jnp.exp(safe_p) * jax.lax.stop_gradient(safe_p - safe_q), 0.0)
        divergence = jnp.sum(slots, axis=-1)
        return reduce_tokens(tokens, divergence, self.reduction), {
            "mean": tokens.mean(divergence),
            "coverage": tokens.mean(jnp.sum(jnp.exp(logprobs), axis=-1)),
        }


@term
class KLTopK:
    """Forward KL over K fixed tokens, ``Σ q·(log q − log p̃)`` (Hinton et al. 2015), for distillation.

    p̃ is the model's distribution renormalised over the K tokens; q is the teacher's, taken as given (it
    sums to 1 if the K tokens are all there is). Choose positions with the batch's weights.

    Args:
      reference: log q [B, T, K]: a name in the batch, an array, or a function of the batch.
      reduction: ``"token_sum"``, ``"token_mean"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean divergence a token in nats; ``coverage``, the mean of Σ p over the tokens.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.log(jnp.array([[[0.2, 0.2]]]))
      >>> batch = {"teacher_logprobs": jnp.log(jnp.array([[[0.5, 0.5]]]))}
      >>> abs(round(jr.losses.KLTopK()(x, batch)[0].item(), 6))
      0.0
    """

    reference: Source = "teacher_logprobs"
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "KLTopK", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T, K]."""
        tokens, logprobs, teacher = _read(self.reference, x, batch, "KLTopK")
        log_p = _renormalised(logprobs, jnp.ones_like(logprobs, bool))
        divergence = jnp.sum(plogp_ratio(teacher, log_p), axis=-1)
        return reduce_tokens(tokens, divergence, self.reduction), {
            "mean": tokens.mean(divergence),
            "coverage": tokens.mean(jnp.sum(jnp.exp(logprobs), axis=-1)),
        }


def _read(source: Source, x: Array, batch: PyTree, who: str) -> tuple[TokenBatch, Array, Array]:
    x = needs(x, 3, who, "logprobs of K tokens at every place, [B, T, K]")
    tokens = as_token_batch(batch, x, who)
    return tokens, logprob_values(tokens, x, who), read_like(source, tokens, x.shape, who, "the teacher")


def _renormalised(logprobs: Array, counted: Array) -> Array:
    """log-softmax over the slots that count; −inf in the others, and where nothing counts."""
    masked = jnp.where(counted, logprobs, -jnp.inf)
    some = jnp.any(not_infinite(masked), axis=-1, keepdims=True)
    return jnp.where(some, jax.nn.log_softmax(jnp.where(some, masked, 0.0), axis=-1), -jnp.inf)
