"""Base losses: what a model is trained for, before anything is added."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    logprob_values,
    real_values,
    reduce_tokens,
)
from jaxreg.terms.term import term


@term
class CrossEntropy:
    """Cross-entropy ``−Σ w·lp``, the loss that remote fine-tuning APIs call ``cross_entropy``.

    Args:
      inputs: what x is: ``"logprobs"``, the log-probabilities [B, T] of the target tokens, or
        [B, T, K] of K targets a token, with weights of the same shape; or ``"logits"`` [B, T, V],
        with the target tokens in the batch.
      targets: the name of the integer array [B, T] of target tokens, for ``"logits"``.
      reduction: ``"token_sum"`` (the APIs' own), ``"token_mean"`` or ``"datum_mean"``. w are the
        batch's ``weights``, which default to its mask.

    Metrics: ``nll``, the weighted mean of −lp a token in nats, and ``perplexity``, exp of it.

    A log-probability of −inf at a token that counts gives +inf, with the gradient −w. A target
    outside of 0 … V−1 at a token that counts gives NaN, not another token's probability.

    Raises:
      ValueError: shapes that do not fit. KeyError: no such targets in the batch.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.from_arrays(weights=jnp.array([[0.0, 1.0, 1.0]]))
      >>> value, metrics = jr.losses.CrossEntropy()(jnp.array([[-9.0, -1.0, -2.0]]), batch)
      >>> value.item(), metrics["nll"].item()
      (3.0, 1.5)
    """

    inputs: Literal["logprobs", "logits"] = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_sum"

    def __post_init__(self) -> None:
        check_choice(self.inputs, ("logprobs", "logits"), "CrossEntropy", "inputs")
        check_choice(self.reduction, REDUCTIONS, "CrossEntropy", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x."""
        tokens = as_token_batch(batch, x, "CrossEntropy")
        if self.inputs == "logits":
            logprobs = self._target_logprobs(real_values(tokens, x, "CrossEntropy"), tokens)
        else:
            logprobs = logprob_values(tokens, x, "CrossEntropy")
        if logprobs.shape != tokens.weights.shape:
            raise ValueError(
                f"CrossEntropy: logprobs have shape {logprobs.shape}, but the batch's weights have "
                f"{tokens.weights.shape}; [B, T, K] logprobs need [B, T, K] weights"
                + ("; say inputs='logits' if x holds logits" if logprobs.ndim == 3 else "")
            )
        nll = tokens.mean(-logprobs)
        return reduce_tokens(tokens, -logprobs, self.reduction), {
            "nll": nll,
            "perplexity": jnp.exp(nll),
        }

    def _target_logprobs(self, logits: Array, tokens: TokenBatch) -> Array:
        if self.targets not in tokens:
            raise KeyError(
                f"CrossEntropy: the batch has no target tokens {self.targets!r}; it has {sorted(tokens)}"
            )
        targets = tokens[self.targets]
        if logits.ndim != 3 or targets.shape != tokens.shape:
            raise ValueError(
                f"CrossEntropy: inputs='logits' takes x [B, T, V] and {self.targets!r} [B, T]; got "
                f"{logits.shape} and {targets.shape}"
            )
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                f"CrossEntropy: {self.targets!r} are token numbers, so integers; got dtype {targets.dtype}"
            )
        # Wide first: 256 does not fit into the uint8 that byte-level targets may come in.
        targets = tokens.where(targets.astype(jnp.int32), 0)
        valid = (targets >= 0) & (targets < logits.shape[-1])
        index = jnp.where(valid, targets, 0)[..., None]
        chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(valid, logprobs, jnp.nan)
