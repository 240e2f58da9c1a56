"""Named reductions, and the few masked operations that the built-in terms are made of."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxreg.base.numbers import widened
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.counting import counted
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.batch.totals import is_part
from jaxreg.batch.values import refuse_positive

Reduction: TypeAlias = Literal["token_mean", "token_sum", "datum_mean"]
REDUCTIONS = ("token_mean", "token_sum", "datum_mean")


def check_choice(value: object, choices: tuple[str, ...], who: str, what: str) -> None:
    """Refuse a value that is not one of the choices, and list them."""
    if value not in choices:
        raise ValueError(f"{who}: {what} is one of {', '.join(map(repr, choices))}; got {value!r}")


def refuse_part(batch: PyTree, who: str, why: str, remedy: str) -> None:
    """Refuse a part of a batch to a term whose value is not the sum of its parts'."""
    if is_part(batch):
        raise ValueError(
            f"{who}: {why}, so the parts of a batch do not add up to the whole; {remedy}, or say "
            f"additive='approximate' in its spec: the parts' own values, weighted by their datums"
        )


def reduce_tokens(batch: TokenBatch, values: Array, reduction: Reduction) -> Array:
    """One scalar of a value a token."""
    if reduction == "token_sum":
        return batch.sum(values)
    return batch.mean(values) if reduction == "token_mean" else batch.datum_mean(values)


def real_values(batch: TokenBatch, x: Array, who: str) -> Array:
    """x in float32 (or float64), with 0 where nothing counts: not real, or of weight 0.

    Where the weights are one a number, as of x [B, T, K] and weights [B, T, K], each number goes by its own.
    """
    if jnp.ndim(x) < 2 or x.shape[:2] != batch.shape:
        raise ValueError(
            f"{who}: expected an array of shape [B, T] or [B, T, V] with (B, T) = {batch.shape}, "
            f"got {jnp.shape(x)}"
        )
    values = widened(x)
    return jnp.where(_counted(batch, x), values, jnp.zeros((), values.dtype))


def counts(batch: TokenBatch) -> Array:
    """[B, T]: the real tokens with a weight that is not 0, which are what a sequence-level quantity is of."""
    return batch.counted


def datums_that_count(batch: TokenBatch) -> Array:
    """[B]: the datums with a token that counts; any other is as if it were not there."""
    return batch.datums_counted


def largest(batch: TokenBatch, values: Array) -> Array:
    """The largest of non-negative values [B, T, ...] among those that count, 0 if none does."""
    return jnp.max(jnp.where(_counted(batch, values), values, jnp.zeros((), values.dtype)), initial=0.0)


def _counted(batch: TokenBatch, values: Array) -> Array:
    array: Array = counted(batch.mask, batch.weights, values.shape)
    return array


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


def logprob_values(batch: TokenBatch, x: Array, who: str) -> Array:
    """`real_values`, of log-probabilities.

    Raises:
      ValueError: one is positive. Only numbers can be told from one another, so a traced x passes.
    """
    values = real_values(batch, x, who)
    refuse_positive(values, who, "x")
    return values
