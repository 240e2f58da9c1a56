"""Terms on whole distributions over a vocabulary, without a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.terms.inputs import distributions
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, log_probabilities, reduce_tokens
from jaxreg.terms.term import term
from jaxreg.terms.vocabulary import possible


@term
class ZLoss:
    """z-loss: the mean of ``logsumexp(logits)²``, which keeps logits from drifting (PaLM, 2022).

    Args:
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

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
        """The penalty of logits x [B, T, V], or [B, V] of a classifier."""
        tokens, logits = distributions(batch, x, "ZLoss")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return reduce_tokens(tokens, jnp.square(log_z), self.reduction), {"log_z": tokens.mean(log_z)}


@term
class LabelSmoothing:
    """Cross-entropy to the uniform distribution, ``−(1/V) Σ log p`` (Szegedy et al. 2016).

    With a base loss that is the cross-entropy to the targets, a weight of ε/(1 − ε) here gives label
    smoothing by ε, up to the factor 1/(1 − ε) on the whole.

    The sum, and V, are over the possible words: one whose probability is 0 in float32 (a vocabulary padded
    with logits of −∞ or −1e9, or a word below 1e-45) is not smoothed over, and gets no gradient from it.

    Args:
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean``, the mean a token in nats.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[[0.0, 0.0, 0.0, 0.0, -jnp.inf]]])  # four words, and one of padding
      >>> round(jr.regularizers.LabelSmoothing()(x, {})[0].item(), 4)
      1.3863
    """

    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, REDUCTIONS, "LabelSmoothing", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T, V], or [B, V] of a classifier."""
        tokens, logits = distributions(batch, x, "LabelSmoothing")
        log_p = log_probabilities(logits)
        words = possible(log_p)
        smoothing = -jnp.sum(jnp.where(words, log_p, 0.0), axis=-1) / jnp.sum(words, axis=-1)
        return reduce_tokens(tokens, smoothing, self.reduction), {"mean": tokens.mean(smoothing)}
