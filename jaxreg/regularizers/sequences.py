"""Terms on answers as sequences: what was said before, and how much."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.segments import starts
from jaxreg.batch.token_batch import as_token_batch
from jaxreg.terms.inputs import target_index
from jaxreg.terms.masked import (
    REDUCTIONS,
    Reduction,
    check_choice,
    counts,
    log_probabilities,
    logprob_values,
    not_infinite,
    real_values,
    reduce_tokens,
)
from jaxreg.terms.term import needs, read, term


@term
class Repetition:
    """Token-level unlikelihood of what was said before (Welleck et al. 2020).

    ``Σ −log(1 − p(c))`` over the distinct tokens c of the last ``window`` tokens, the target itself left out.

    Args:
      tokens: the tokens [B, T] that x predicts: a name in the batch.
      window: how many tokens back, **32**; padding and holes in between are no tokens.
      context: whether what was said before includes real tokens of weight 0, such as a prompt, as in the
        paper; **False**: the answer alone.
      floor: 1 − p is kept above it, **1e-6**; there is no gradient beyond.
      reduction: **"token_mean"**, ``"token_sum"`` or ``"datum_mean"``.

    Metrics: ``mass``, the mean probability of repeating one of them.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> batch = {"target_tokens": jnp.array([[0, 1]])}
      >>> value, _ = jr.regularizers.Repetition()(jnp.zeros((1, 2, 2)), batch)
      >>> round(value.item(), 4)  # half of log 2: one place in two could repeat
      0.3466
    """

    tokens: str = "target_tokens"
    window: int = 32
    context: bool = False
    floor: float = 1e-6
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(f"Repetition: window is a whole number ≥ 1, got {self.window!r}")
        if not 0 < self.floor < 1:
            raise ValueError(f"Repetition: floor is within 0 … 1, got {self.floor!r}")
        check_choice(self.reduction, REDUCTIONS, "Repetition", "reduction")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of logits x [B, T, V]."""
        x = needs(x, 3, "Repetition", "logits or logprobs [B, T, V]")
        tokens = as_token_batch(batch, x, "Repetition")
        log_p = log_probabilities(real_values(tokens, x, "Repetition"))
        said = read(self.tokens, tokens, "Repetition", "the tokens")
        if said.shape != tokens.shape:
            raise ValueError(f"Repetition: {self.tokens!r} has shape {said.shape}, but x has {x.shape}")
        _, valid = target_index(tokens, self.tokens, x.shape, "Repetition")
        taken = tokens.mask if self.context else counts(tokens)
        begins = None if tokens.segments is None else starts(tokens.segments, tokens.shape)
        seen = _said_before(said, taken, self.window, x.shape[-1], begins)
        each = jnp.where(seen, -jnp.log(jnp.maximum(-jnp.expm1(log_p), self.floor)), 0.0)
        p = jnp.exp(log_p)
        mass = jnp.sum(jnp.where(seen, p, 0.0), axis=-1)
        loss = reduce_tokens(tokens, jnp.where(valid, jnp.sum(each, axis=-1), jnp.nan), self.reduction)
        return loss, {"mass": tokens.mean(mass)}


@term
class Length:
    """Expected-length penalty on sampled answers, as a score-function surrogate (Williams 1992).

    ``mean over datums of (max(n − target, 0) / target) · Σ lp``, n the number of tokens that count: its
    gradient is the estimate of that of the expected relative excess; its value is no length.

    Args:
      target: the length, in tokens, up to which nothing is penalised.

    Metrics: ``length``, the mean n; ``excess``, the mean relative excess.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> value, metrics = jr.regularizers.Length(target=2)(jnp.full((1, 4), -0.5), {})
      >>> value.item(), metrics["excess"].item()
      (-2.0, 1.0)
    """

    target: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(f"Length: target is a positive number of tokens, got {self.target!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The surrogate of sampled-token logprobs x [B, T]."""
        x = needs(x, 2, "Length", "sampled-token logprobs [B, T]")
        tokens = as_token_batch(batch, x, "Length")
        logprobs = logprob_values(tokens, x, "Length")
        logprobs = jnp.where(not_infinite(logprobs), logprobs, 0.0)
        length = tokens.sum_by_datum(counts(tokens).astype(logprobs.dtype))
        excess = jnp.maximum(length - self.target, 0.0) / self.target
        score = tokens.sum_by_datum(logprobs)
        return tokens.mean(excess * score), {"length": tokens.mean(length), "excess": tokens.mean(excess)}


def _said_before(said: Array, taken: Array, window: int, vocabulary: int, begins: Array | None) -> Array:
    """Which words stand among the last ``window`` tokens before each, itself left out: bool [B, T, V].

    Only tokens that are taken [B, T] have been said; places between them do not use up the window. Where a
    row holds several datums, each begins anew where ``begins`` [B, T] says.
    """
    said = jnp.where(taken, said, -1)  # one_hot of −1 is 0 everywhere
    one_hot = jax.nn.one_hot(said, vocabulary, dtype=jnp.float32)
    before = jnp.cumsum(one_hot, axis=1) - one_hot
    if begins is not None:
        earlier = jnp.cumsum(taken, axis=1) - taken
        own = earlier - jnp.take_along_axis(earlier, begins, axis=1)  # how many of its own were taken before
        before -= jnp.take_along_axis(before, begins[..., None], axis=1)
        if window < said.shape[1]:
            order = jnp.argsort(~taken, axis=1, stable=True)
            leave = jnp.maximum(own - window, 0) + jnp.take_along_axis(earlier, begins, axis=1)
            start = jnp.take_along_axis(order, jnp.minimum(leave, said.shape[1] - 1), axis=1)
            gone = jnp.take_along_axis(before, start[..., None], axis=1)
            before -= jnp.where((own > window)[..., None], gone, 0.0)
    elif window < said.shape[1]:
        rank = jnp.cumsum(taken, axis=1) - taken  # how many tokens were taken before
        order = jnp.argsort(~taken, axis=1, stable=True)  # where those that are taken stand
        start = jnp.take_along_axis(order, jnp.maximum(rank - window, 0), axis=1)
        before -= jnp.take_along_axis(before, start[..., None], axis=1)
    return (before > 0.5) & (one_hot < 0.5)
