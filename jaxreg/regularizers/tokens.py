"""Terms on the logprobs of given tokens, one at a time."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.estimators import Gradient, check_gradient, estimated, off_policy
from jaxreg.terms.inputs import (
    INPUTS,
    Inputs,
    check_weights,
    read_folded,
    sampled,
    token_logprobs,
    token_rows,
)
from jaxreg.terms.masked import REDUCTIONS, Reduction, check_choice, not_infinite, reduce_tokens
from jaxreg.terms.term import Source, needs, term


@term
class LogRatioL2:
    """Mean squared log-ratio to a reference, ``g²`` with ``g = lp − ref`` (Azar et al. 2024 regress on it).

    ``gradient`` says what is differentiated:

    - **"pathwise"**: 2g·∇lp, the gradient of this regression on the tokens as given. Over tokens drawn from
      the model it is in expectation that of 2·KL(p‖ref), not that of E_p[g²].
    - ``"score"``: (g² + 2g)·∇lp, over tokens drawn from the model that of E_p[g²].

    Args:
      reference: logprobs of the shape of x ([B, T] for logits): a name in the batch, an array, or a function
        of the batch. No gradient.
      gradient: see above.
      sampler: the logprobs of whatever drew the tokens, where that is not the model itself, as ``reference``.
        The gradient is then weighted by p/s.
      inputs: what x is: **"logprobs"** of given tokens [B, T], or of K tokens a place [B, T, K]; or
        ``"logits"`` [..., V].
      targets: for ``"logits"``, the name of the integer array of tokens.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mean`` of lp − ref. A token with a log-ratio that is not finite is left out.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"ref_logprobs": jnp.array([[-1.0, -2.0]])}
      >>> jr.regularizers.LogRatioL2()(jnp.array([[-1.0, -4.0]]), batch)[0].item()
      2.0
    """

    reference: Source = "ref_logprobs"
    gradient: Gradient = "pathwise"
    sampler: Source | None = None
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self.inputs, INPUTS, "LogRatioL2", "inputs")
        check_choice(self.reduction, REDUCTIONS, "LogRatioL2", "reduction")
        check_gradient(self.gradient, "LogRatioL2")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The penalty of x [B, T] or [B, T, K], or of logits."""
        who = "LogRatioL2"
        tokens = token_rows(batch, x, who, self.inputs, per_token=False)
        logprobs = token_logprobs(tokens, x, who, self.inputs, self.targets)
        check_weights(tokens, logprobs.shape, who)
        shape = x.shape if self.inputs == "logprobs" else x.shape[:-1]
        trailing = logprobs.ndim - 2
        reference = read_folded(self.reference, tokens, shape, who, "the reference", trailing=trailing)
        off = off_policy(self.sampler, tokens, logprobs, shape, who, trailing=trailing)
        finite = not_infinite(logprobs) & not_infinite(reference)
        logprobs = jnp.where(finite, logprobs, 0.0)
        gap = logprobs - jnp.where(finite, reference, 0.0)
        squares = jnp.square(gap)
        if self.gradient == "score" or off is not None:
            slope = 2 * gap + (squares if self.gradient == "score" else 0.0)
            squares = estimated(squares, logprobs, jnp.where(finite, slope, 0.0), off)
        return reduce_tokens(tokens, squares, self.reduction), {"mean": tokens.mean(gap)}


@term
class Focal:
    """Focal loss ``−α (1 − p)^γ log p`` of the target tokens' logprobs (Lin et al. 2017).

    A loss on given targets, with its own gradient.

    Args:
      gamma: γ, **2**: how much sure tokens count for less.
      alpha: α, **1**.
      inputs: what x is: **"logprobs"** of the targets [B, T], or ``"logits"`` [..., V].
      targets: for ``"logits"``, the name of the integer array of targets.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``p``, the mean probability of a target. A target of probability 0 makes the value +inf and gets
    no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> round(jr.regularizers.Focal()(jnp.log(jnp.array([[0.5]])), {})[0].item(), 4)
      0.1733
    """

    gamma: float = 2.0
    alpha: float = 1.0
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not self.gamma >= 1:
            raise ValueError(
                f"Focal: gamma is ≥ 1 (below, the derivative at p = 1 is infinite), got {self.gamma!r}"
            )
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"Focal: alpha is a finite number ≥ 0, got {self.alpha!r}")
        check_choice(self.inputs, INPUTS, "Focal", "inputs")
        check_choice(self.reduction, REDUCTIONS, "Focal", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T], or of logits."""
        tokens, logprobs = sampled(batch, x, "Focal", self.inputs, self.targets, "target")
        finite = not_infinite(logprobs)
        safe = jnp.where(finite, logprobs, 0.0)
        unsure = -jnp.expm1(safe)
        unsure = jnp.where(unsure < 0, 0.0, unsure)
        loss = jnp.where(finite, -self.alpha * unsure**self.gamma * safe, jnp.inf)
        return reduce_tokens(tokens, loss, self.reduction), {"p": tokens.mean(jnp.exp(logprobs))}


@term
class Unlikelihood:
    """Unlikelihood ``−log(1 − p)`` of tokens that should not be said (Welleck et al. 2020).

    A loss on given tokens, with its own gradient.

    Args:
      candidates: which tokens are the unwanted ones, 0 or 1 (or a weight) a token, [B, T] or [B]: a name in
        the batch, an array, or a function of the batch. **None**: every token that counts.
      floor: 1 − p is kept above it, **1e-6**; there is no gradient beyond.
      inputs: what x is: **"logprobs"** of the tokens in question [B, T], or ``"logits"`` [..., V].
      targets: for ``"logits"``, the name of the integer array of these tokens.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``p``, the mean probability of a candidate.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> round(jr.regularizers.Unlikelihood()(jnp.log(jnp.array([[0.5]])), {})[0].item(), 4)
      0.6931
    """

    candidates: Source | None = None
    floor: float = 1e-6
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError(f"Unlikelihood: floor is within 0 … 1, got {self.floor!r}")
        check_choice(self.inputs, INPUTS, "Unlikelihood", "inputs")
        check_choice(self.reduction, REDUCTIONS, "Unlikelihood", "reduction")

    @property
    def reweighted(self) -> tuple[str, ...]:
        """The arrays of the batch that its weights are multiplied by."""
        return (self.candidates,) if isinstance(self.candidates, str) else ()

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T], the logprobs of the tokens in question, or of logits."""
        who = "Unlikelihood"
        if self.inputs == "logprobs":
            needs(x, 2, who, "logits (with inputs='logits') or sampled-token logprobs [B, T]")
        tokens = token_rows(batch, x, who, self.inputs)
        if tokens.totals is not None and self.candidates is not None:
            tokens = _reweighted_part(tokens, self.candidates)
        elif self.candidates is not None:
            shape = x.shape if self.inputs == "logprobs" else x.shape[:-1]
            chosen = read_folded(self.candidates, tokens, shape, who, "candidates", per_datum=True)
            tokens = tokens.replace(weights=tokens.weights * chosen)
        logprobs = token_logprobs(tokens, x, who, self.inputs, self.targets)
        rest = -jnp.expm1(logprobs)
        loss = -jnp.log(jnp.where(rest < self.floor, self.floor, rest))
        return reduce_tokens(tokens, loss, self.reduction), {"p": tokens.mean(jnp.exp(logprobs))}


def _reweighted_part(tokens: TokenBatch, candidates: Source) -> TokenBatch:
    """A part of a batch with the candidates' weights, which the whole was summed under."""
    if not isinstance(candidates, str):
        raise ValueError(
            "Unlikelihood: this batch is a part of one, and only of candidates that are an array of the "
            "batch, by its name, can the whole's weights be known: put them into the batch, "
            "candidates='unwanted'"
        )
    return tokens.reweighted(candidates)
