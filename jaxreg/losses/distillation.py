"""Losses on a teacher's top-K: x holds the model's logprobs of K given tokens at every place, [B, T, K].

Neither side's K probabilities need sum to 1; ``tail`` says what becomes of the rest:

- ``"renormalize"``, the default: both sides are divided by their sums over the slots. A model that has the
  teacher's proportions is at 0, however much it gives to other words. So do the recipes of remote fine-tuning
  APIs and most distillation code that keeps a teacher's top-K.
- ``"bucket"``: one more slot on both sides, with 1 − Σ (the "ghost token" of Anshumann et al. 2025): the rest
  is one word. Never above the divergence of the whole distributions.
- ``"ignore"``: the sum over the K slots as it is, which may be negative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.terms.divergences import FORWARD, REVERSE
from jaxreg.terms.inputs import read_folded, token_logprobs, token_rows
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    not_infinite,
    plogp_ratio,
    reduce_tokens,
)
from jaxreg.terms.tails import TAILS, Tail, divergence_of_slots, with_bucket
from jaxreg.terms.term import Source, needs, term


@term
class _TopK:
    """What both read, and report."""

    reference: Source = "teacher_logprobs"
    tail: Tail = "renormalize"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.tail, TAILS, type(self).__name__, "tail")
        check_choice(self.reduction, REDUCTIONS, type(self).__name__, "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T, K]."""
        who = type(self).__name__
        x = needs(x, 3, who, "logprobs of K tokens at every place, [B, T, K]")
        tokens = token_rows(batch, x, who, "logprobs")
        logprobs = token_logprobs(tokens, x, who, "logprobs", "")
        teacher = read_folded(self.reference, tokens, x.shape, who, "the teacher", trailing=1)
        value = self._of_slots(logprobs, teacher)
        return reduce_tokens(tokens, value, self.reduction), {
            "mean": tokens.mean(value),
            "coverage": tokens.mean(jnp.sum(jnp.exp(logprobs), axis=-1)),
        }

    def _of_slots(self, log_p: Array, log_q: Array) -> Array:
        raise NotImplementedError


@term
class ReverseKLTopK(_TopK):
    """Reverse KL over K slots, ``KL(p̃‖q̃) = Σ p̃·(log p̃ − log q̃)`` (Gu et al. 2024), for distillation.

    p̃ and q̃ are the model's and the teacher's probabilities over the slots where the teacher's is not 0; the
    other slots are excluded, and with a bucket belong to the rest. The gradient is that of the divergence,
    which is the policy gradient ``Σ p̃·sg[log p̃ − log q̃]``, since Σ p̃·∇log p̃ = 0; with ``tail="ignore"`` it is
    this one, the K slots' part of the whole gradient, though Σ p̃ is not constant.

    Args:
      reference: the teacher's logprobs [B, T, K]: a name in the batch, an array, or a function of it.
      tail: what becomes of the words that are not among the K. **"renormalize"**: both sides are divided by
        their sums over the slots, as remote fine-tuning APIs do; ``"bucket"``: one more slot on both sides,
        with 1 − Σ; ``"ignore"``: nothing, so the sum may be negative. With the first two it never is.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean divergence a token in nats; ``coverage``, the mean of Σ p over the slots.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.log(jnp.array([[[0.5, 0.25]]]))
      >>> loss, metrics = jr.losses.ReverseKLTopK()(x, {"teacher_logprobs": x})
      >>> abs(round(loss.item(), 6)), metrics["coverage"].item()
      (0.0, 0.75)
    """

    def _of_slots(self, log_p: Array, log_q: Array) -> Array:
        counted = not_infinite(log_q)
        if self.tail == "bucket":
            return divergence_of_slots(FORWARD, with_bucket(log_p, counted), with_bucket(log_q, counted))
        if self.tail == "renormalize":
            return divergence_of_slots(FORWARD, jnp.where(counted, log_p, -jnp.inf), log_q)
        live = counted & not_infinite(log_p)
        safe_p, safe_q = jnp.where(live, log_p, 0.0), jnp.where(live, log_q, 0.0)
        slots = jnp.exp(safe_p) * jax.lax.stop_gradient(safe_p - safe_q)
        return jnp.sum(jnp.where(live, slots, 0.0), axis=-1)


@term
class KLTopK(_TopK):
    """Forward KL over K given tokens, ``KL(q̃‖p̃) = Σ q̃·(log q̃ − log p̃)`` (Hinton et al. 2015).

    p̃ and q̃ are the model's and the teacher's probabilities over the K tokens, a teacher's 0 included. Choose
    positions with the batch's weights. The gradient is that of the divergence.

    Args:
      reference: log q [B, T, K]: a name in the batch, an array, or a function of the batch.
      tail: as in `ReverseKLTopK`. **"renormalize"**; with a teacher whose K tokens are all there is, so that
        Σ q = 1, ``"bucket"`` penalises what the model gives to other words, too.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean divergence a token in nats; ``coverage``, the mean of Σ p over the tokens.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.log(jnp.array([[[0.3, 0.2, 0.1]]]))  # the teacher's own top 3, of mass 0.6
      >>> abs(round(jr.losses.KLTopK()(x, {"teacher_logprobs": x})[0].item(), 6))
      0.0
    """

    def _of_slots(self, log_p: Array, log_q: Array) -> Array:
        if self.tail == "bucket":
            every = jnp.ones_like(log_p, bool)
            return divergence_of_slots(REVERSE, with_bucket(log_p, every), with_bucket(log_q, every))
        if self.tail == "renormalize":
            return divergence_of_slots(REVERSE, log_p, log_q)
        return jnp.sum(plogp_ratio(log_q, log_p), axis=-1)
