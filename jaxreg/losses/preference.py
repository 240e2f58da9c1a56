"""Losses on pairs of answers: rows alternate, chosen and rejected.

`TokenBatch.pack` pads to an even number of rows, so pairs stay pairs. A pair of padded rows counts for
nothing; half a pair (a chosen answer without a rejected one, or the reverse) makes the loss NaN.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch, as_token_batch
from jaxreg.terms.masked import logprob_values, not_infinite
from jaxreg.terms.term import Source, needs, read_like, term


@term
class DPO:
    """Direct preference optimization (Rafailov et al. 2023): mean of ``−log σ(β(Δ⁺ − Δ⁻))`` over pairs.

    ``Δ = Σ w·(lp − ref)`` over a row's tokens.

    Args:
      beta: **0.1**.
      reference: the reference model's logprobs [B, T]: a name in the batch, an array, or a function of the
        batch. No gradient.

    Metrics: ``accuracy``, the share of pairs with Δ⁺ > Δ⁻; ``margin``, the mean of β(Δ⁺ − Δ⁻);
    ``chosen_reward`` and ``rejected_reward``, the means of βΔ.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[-1.0, -1.0], [-3.0, -3.0]])
      >>> loss, metrics = jr.losses.DPO()(x, {"ref_logprobs": jnp.full((2, 2), -2.0)})
      >>> round(loss.item(), 4), round(metrics["margin"].item(), 4)
      (0.513, 0.4)
    """

    rows_together: ClassVar[int] = 2

    beta: float = 0.1
    reference: Source = "ref_logprobs"

    def __post_init__(self) -> None:
        _check_positive(self.beta, "DPO", "beta")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T], B even."""
        tokens, logprobs = _read(x, batch, "DPO")
        reference = read_like(self.reference, tokens, x.shape, "DPO", "the reference")
        finite = not_infinite(logprobs) & not_infinite(reference)
        gap = jnp.where(finite, logprobs, 0.0) - jnp.where(finite, reference, 0.0)
        return _logistic(tokens, self.beta * tokens.datum_sum(gap), 0.0)


@term
class SimPO:
    """Simple preference optimization (Meng et al. 2024), without a reference model.

    The mean over pairs of ``−log σ(β(m⁺ − m⁻) − γ)``, with m the mean logprob of a row's tokens.

    Args:
      beta: **2.0**.
      gamma: the target margin, **0.5**.

    Metrics: as in `DPO`, with rewards βm.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> loss, _ = jr.losses.SimPO()(jnp.array([[-1.0, -1.0], [-3.0, -3.0]]), {})
      >>> round(loss.item(), 4)
      0.0298
    """

    rows_together: ClassVar[int] = 2

    beta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(self.beta, "SimPO", "beta")
        if not math.isfinite(self.gamma):
            raise ValueError(f"SimPO: gamma is a finite number, got {self.gamma!r}")

    def __call__(self, x: Array, batch: PyTree) -> tuple[Array, dict[str, Array]]:
        """The loss of x [B, T], B even."""
        tokens, logprobs = _read(x, batch, "SimPO")
        finite = not_infinite(logprobs)
        means = tokens.datum_means(jnp.where(finite, logprobs, 0.0))
        return _logistic(tokens, self.beta * means, self.gamma)


def _read(x: Array, batch: PyTree, who: str) -> tuple[TokenBatch, Array]:
    x = needs(x, 2, who, "logprobs [B, T]")
    if x.shape[0] % 2:
        raise ValueError(
            f"{who}: rows alternate, chosen and rejected, so their number is even; got {x.shape[0]} rows"
        )
    tokens = as_token_batch(batch, x, who)
    return tokens, logprob_values(tokens, x, who)


def _logistic(tokens: TokenBatch, rewards: Array, margin: float) -> tuple[Array, dict[str, Array]]:
    """Mean over real pairs of −log σ(chosen − rejected − margin), and what people look at."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    real = tokens.lengths > 0
    both = real[0::2] & real[1::2]
    half = jnp.any(real[0::2] ^ real[1::2])
    difference = chosen - rejected
    loss = _mean(-jax.nn.log_sigmoid(difference - margin), both)
    # Half a pair poisons the value and the gradient alike: neither would mean anything.
    return loss * jnp.where(half, jnp.nan, 1.0), {
        "accuracy": _mean((difference > 0).astype(difference.dtype), both),
        "margin": _mean(difference, both),
        "chosen_reward": _mean(chosen, both),
        "rejected_reward": _mean(rejected, both),
    }


def _mean(values: Array, counted: Array) -> Array:
    count = jnp.maximum(jnp.sum(counted), 1).astype(values.dtype)
    return jnp.sum(jnp.where(counted, values, 0.0)) / count


def _check_positive(value: float, who: str, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{who}: {what} is a positive number, got {value!r}")
