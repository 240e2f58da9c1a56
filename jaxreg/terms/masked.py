"""Named reductions, and the few masked operations that the built-in terms are made of."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import widened
from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch

Reduction: TypeAlias = Literal["token_mean", "token_sum", "datum_mean"]
REDUCTIONS = ("token_mean", "token_sum", "datum_mean")


def check_choice(value: object, choices: tuple[str, ...], who: str, what: str) -> None:
    """Refuse a value that is not one of the choices, and list them."""
    if value not in choices:
        raise ValueError(f"{who}: {what} is one of {', '.join(map(repr, choices))}; got {value!r}")


def reduce_tokens(batch: TokenBatch, values: Array, reduction: Reduction) -> Array:
    """One scalar of a value a token."""
    if reduction == "token_sum":
        return batch.sum(values)
    return batch.mean(values) if reduction == "token_mean" else batch.datum_mean(values)


def real_values(batch: TokenBatch, x: Array, who: str, *, by_mask: bool = False) -> Array:
    """x in float32 (or float64), with 0 where no token counts: not real, or (unless by_mask) of weight 0."""
    if jnp.ndim(x) < 2 or x.shape[:2] != batch.shape:
        raise ValueError(
            f"{who}: expected an array of shape [B, T] or [B, T, V] with (B, T) = {batch.shape}, "
            f"got {jnp.shape(x)}"
        )
    counted = batch.mask if by_mask else counts(batch)
    counted = counted.reshape(batch.shape + (1,) * (x.ndim - 2))
    values = widened(x)
    return jnp.where(counted, values, jnp.zeros((), values.dtype))


def counts(batch: TokenBatch) -> Array:
    """[B, T]: the real tokens with a weight that is not 0."""
    weighty = batch.weights != 0
    return batch.mask & (weighty if weighty.ndim == 2 else jnp.any(weighty, axis=-1))


def largest(batch: TokenBatch, values: Array) -> Array:
    """The largest of non-negative values [B, T, ...] among the tokens that count, 0 if none does."""
    counted = counts(batch).reshape(batch.shape + (1,) * (values.ndim - 2))
    return jnp.max(jnp.where(counted, values, jnp.zeros((), values.dtype)), initial=0.0)


def log_probabilities(x: Array, temperature: float = 1.0) -> Array:
    """Normalised log-probabilities over the last axis, of logits or of log-probabilities alike."""
    return jax.nn.log_softmax(x / temperature, axis=-1)


def not_infinite(values: Array) -> Array:
    """Where a log-probability is not −∞. NaN is not left out: it has to reach the loss and be seen."""
    return ~jnp.isinf(values)


def plogp_ratio(log_p: Array, log_q: Array) -> Array:
    """p·(log p − log q), 0 where p = 0, +∞ (with gradient 0) where only q = 0."""
    finite = not_infinite(log_p) & not_infinite(log_q)
    safe_p, safe_q = jnp.where(finite, log_p, 0.0), jnp.where(finite, log_q, 0.0)
    limit = jnp.where(jnp.isneginf(log_p), 0.0, jnp.inf)
    return jnp.where(finite, jnp.exp(safe_p) * (safe_p - safe_q), limit)


def logprob_values(batch: TokenBatch, x: Array, who: str, *, by_mask: bool = False) -> Array:
    """`real_values`, of log-probabilities.

    Raises:
      ValueError: one is positive. Only numbers can be told from one another, so a traced x passes.
    """
    values = real_values(batch, x, who, by_mask=by_mask)
    if not isinstance(values, jax.core.Tracer) and values.size and float(jnp.max(values)) > 1e-3:
        raise ValueError(
            f"{who}: logprobs are ≤ 0, but x holds {float(jnp.max(values)):.4g}; if these are probabilities, "
            f"take their logarithm"
        )
    return values
