"""Base losses: what a model is trained for, before anything is added."""

from __future__ import annotations

from typing import ClassVar

from jaxreg.base.kinds import Kinds
from jaxreg.base.types import Array, PyTree
from jaxreg.terms.inputs import INPUTS, Inputs, token_logprobs, token_rows
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, reduce_tokens
from jaxreg.terms.ratios import perplexity
from jaxreg.terms.term import term


@term
class CrossEntropy:
    """Cross-entropy ``−lp`` a token; its ``token_sum``, ``−Σ w·lp``, is the remote APIs' ``cross_entropy``.

    Args:
      inputs: what x is: ``"logprobs"``, the log-probabilities [B, T] of the target tokens, or [B, T, K] of K
        targets a token, with weights of the same shape; or ``"logits"`` [B, T, V] (of a classifier [B, V]),
        with the target tokens (the labels) in the batch.
      targets: the name of the integer array of target tokens, [B, T] or [B], for ``"logits"``.
      reduction: **"token_mean"**, ``"token_sum"`` (the remote APIs' own) or ``"datum_mean"``. w are the
        batch's ``weights``, which default to its mask.

    Metrics: ``nll``, the weighted mean of −lp a token in nats, and ``perplexity``, exp of it.

    A log-probability of −inf at a token that counts gives +inf, with the gradient −w. A target outside of 0 …
    V−1 is what tokens without a target may have, such as −100, where the mask or the weight leaves them out.
    At a token that counts it is an error, or, where the numbers are traced, NaN.

    Raises:
      ValueError: shapes that do not fit; a positive logprob, a target that is no word (of concrete numbers).
      KeyError: no such targets in the batch. TypeError: targets that are no integers.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = jr.TokenBatch.from_arrays(weights=jnp.array([[0.0, 1.0, 1.0]]))
      >>> value, metrics = jr.losses.CrossEntropy()(jnp.array([[-9.0, -1.0, -2.0]]), batch)
      >>> value.item(), metrics["nll"].item()
      (1.5, 1.5)
    """

    metric_kinds: ClassVar = Kinds("sum", perplexity=("exp", "nll"))
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.inputs, INPUTS, "CrossEntropy", "inputs")
        check_choice(self.reduction, REDUCTIONS, "CrossEntropy", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x."""
        tokens = token_rows(batch, x, "CrossEntropy", self.inputs, per_token=False)
        logprobs = token_logprobs(tokens, x, "CrossEntropy", self.inputs, self.targets)
        if logprobs.shape != tokens.weights.shape:
            raise ValueError(
                f"CrossEntropy: logprobs have shape {logprobs.shape}, but the batch's weights have "
                f"{tokens.weights.shape}; [B, T, K] logprobs need [B, T, K] weights"
                + ("; say inputs='logits' if x holds logits" if logprobs.ndim == 3 else "")
            )
        nll = tokens.mean(-logprobs)
        return reduce_tokens(tokens, -logprobs, self.reduction), {
            "nll": nll,
            "perplexity": perplexity(nll),
        }
