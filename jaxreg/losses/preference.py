"""Losses on pairs of answers: rows alternate, chosen and rejected.

`TokenBatch.pack_pairs` makes such a batch, and the losses refuse it once its rows are pairs no more. A pair
of which no token counts (padded rows, or weights of 0) is as if it were not there. Half a pair, a chosen
answer without a rejected one or the reverse, is refused: by an error where numbers can be told, by NaN where
they are traced.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.pairs import broken_pairs
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.inputs import INPUTS, Inputs, sampled
from jaxreg.terms.masked import check_choice, datums_that_count, not_infinite
from jaxreg.terms.term import Source, needs, read_like, term

Result = tuple[Array, dict[str, Array]]


@term
class DPO:
    """Direct preference optimization on rows that alternate, chosen, rejected, chosen, rejected, ...

    The mean over pairs of ``−(1 − ε) log σ(βh) − ε log σ(−βh)`` with ``h = Δ⁺ − Δ⁻`` (Rafailov et al. 2023;
    with ε > 0, conservative DPO, Mitchell 2023), or, as ``"ipo"``, of ``(h − 1/(2β))²`` (Azar et al. 2024).
    ``Δ = Σ w·(lp − ref)`` over a row's tokens.

    `TokenBatch.pack_pairs` puts rows in this order. All chosen rows first and then all rejected ones, as
    other libraries concatenate them, would be other pairs; of such arrays [N, T] make these rows with
    ``jnp.stack([chosen, rejected], 1).reshape(2 * N, T)``.

    Args:
      beta: **0.1**.
      reference: the reference model's logprobs [B, T]: a name in the batch, an array, or a function of the
        batch. No gradient. None: no reference, ``Δ = Σ w·lp``.
      loss_type: **"sigmoid"** or ``"ipo"``.
      label_smoothing: ε, the share of pairs that may be the wrong way round, 0 … 0.5, **0**; with
        ``"sigmoid"`` only.
      inputs: what x is: **"logprobs"** of the answers' tokens [B, T], or ``"logits"`` [B, T, V].
      targets: for ``"logits"``, the name of the integer array of the answers' tokens.
      average_tokens: Δ is the weighted mean over a row's tokens, ``Σ w·(lp − ref) / Σ w``, **False**. Both
        papers sum; for IPO, TRL takes the mean: ``DPO(loss_type="ipo", average_tokens=True)``.

    Metrics: ``accuracy``, the share of pairs with Δ⁺ > Δ⁻; ``margin``, the mean of βh;
    ``chosen_reward`` and ``rejected_reward``, the means of βΔ.

    Raises:
      ValueError: an odd number of rows, a batch that says that its rows are no pairs, or half a pair.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> x = jnp.array([[-1.0, -1.0], [-3.0, -3.0]])
      >>> loss, metrics = jr.losses.DPO()(x, {"ref_logprobs": jnp.full((2, 2), -2.0)})
      >>> round(loss.item(), 4), round(metrics["margin"].item(), 4)
      (0.513, 0.4)
    """

    rows_together: ClassVar[int] = 2

    beta: float = 0.1
    reference: Source | None = "ref_logprobs"
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    average_tokens: bool = False
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"

    def __post_init__(self) -> None:
        _check_positive(self.beta, "DPO", "beta")
        check_choice(self.inputs, INPUTS, "DPO", "inputs")
        check_choice(self.loss_type, ("sigmoid", "ipo"), "DPO", "loss_type")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"DPO: label_smoothing is within 0 … 0.5, got {self.label_smoothing!r}")
        if self.label_smoothing and self.loss_type == "ipo":
            raise ValueError("DPO: label_smoothing goes with loss_type='sigmoid'; IPO has none")

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], B even."""
        tokens, logprobs = _read(x, batch, "DPO", self.inputs, self.targets)
        finite = not_infinite(logprobs)
        gap = logprobs
        if self.reference is not None:
            reference = read_like(self.reference, tokens, tokens.shape, "DPO", "the reference", logprobs=True)
            finite &= not_infinite(reference)
            gap = jnp.where(finite, logprobs, 0.0) - jnp.where(finite, reference, 0.0)
        gap = jnp.where(finite, gap, 0.0)
        deltas = tokens.datum_means(gap) if self.average_tokens else tokens.datum_sum(gap)
        gaps = deltas[0::2] - deltas[1::2]
        if self.loss_type == "ipo":
            losses = jnp.square(gaps - 1 / (2 * self.beta))
        else:
            losses = -jax.nn.log_sigmoid(self.beta * gaps)
            if self.label_smoothing:
                # log σ(−z) = log σ(z) − z
                losses += self.label_smoothing * self.beta * gaps
        return _over_pairs(tokens, losses, self.beta * deltas, "DPO")


@term
class SimPO:
    """Simple preference optimization on rows that alternate, chosen, rejected, ..., without a reference.

    The mean over pairs of ``−log σ(β(m⁺ − m⁻) − γ)``, with m the weighted mean logprob of a row's tokens
    (Meng et al. 2024). `TokenBatch.pack_pairs` puts rows in this order; see `DPO`.

    Args:
      beta: **2.0**.
      gamma: the target margin, **0.5**.
      inputs, targets: as in `DPO`.

    Metrics: as in `DPO`, with rewards βm.

    Raises:
      ValueError: as in `DPO`.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> loss, _ = jr.losses.SimPO()(jnp.array([[-1.0, -1.0], [-3.0, -3.0]]), {})
      >>> round(loss.item(), 4)
      0.0298
    """

    rows_together: ClassVar[int] = 2

    beta: float = 2.0
    gamma: float = 0.5
    inputs: Inputs = "logprobs"
    targets: str = "target_tokens"

    def __post_init__(self) -> None:
        check_choice(self.inputs, INPUTS, "SimPO", "inputs")
        _check_positive(self.beta, "SimPO", "beta")
        if not math.isfinite(self.gamma):
            raise ValueError(f"SimPO: gamma is a finite number, got {self.gamma!r}")

    def __call__(self, x: Array, batch: PyTree) -> Result:
        """The loss of x [B, T], B even."""
        tokens, logprobs = _read(x, batch, "SimPO", self.inputs, self.targets)
        finite = not_infinite(logprobs)
        rewards = self.beta * tokens.datum_means(jnp.where(finite, logprobs, 0.0))
        losses = -jax.nn.log_sigmoid(rewards[0::2] - rewards[1::2] - self.gamma)
        return _over_pairs(tokens, losses, rewards, "SimPO")


def _read(x: Array, batch: PyTree, who: str, inputs: Inputs, targets: str) -> tuple[TokenBatch, Array]:
    x = needs(x, 2, who, "logprobs [B, T]") if inputs == "logprobs" else needs(x, 3, who, "logits [B, T, V]")
    tokens, logprobs = sampled(batch, x, who, inputs, targets)
    if tokens.datums % 2:
        raise ValueError(
            f"{who}: rows alternate, chosen and rejected, so their number is even; got {tokens.datums} rows"
        )
    return tokens, logprobs


def _over_pairs(tokens: TokenBatch, losses: Array, rewards: Array, who: str) -> Result:
    """The mean over the pairs that count, of losses [B/2], and what people look at, of rewards [B]."""
    tokens.check_whole(who)
    counts = datums_that_count(tokens)
    both = counts[0::2] & counts[1::2]
    poison = _refused(
        counts[0::2] ^ counts[1::2],
        f"{who}: pair {{}} is half a pair: of one of its two answers no token counts (all are masked or of "
        f"weight 0); leave the pair out, or give both weight 0",
    )
    if tokens.pairs is not None:
        poison *= _refused(
            broken_pairs(jnp.asarray(tokens.pairs)),
            f"{who}: rows alternate, chosen and rejected, but the batch's own `pairs` say that its rows {{}} "
            f"are no pair; were rows left out or reordered since pack_pairs?",
            rows=True,
        )
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    # Both poison the value and the gradient alike: neither would mean anything.
    count = jnp.sum(both) if tokens.totals is None else tokens.totals.pairs()
    return _mean(losses, both, count) * poison, {
        "accuracy": _mean((margin > 0).astype(margin.dtype), both, count),
        "margin": _mean(margin, both, count),
        "chosen_reward": _mean(chosen, both, count),
        "rejected_reward": _mean(rejected, both, count),
    }


def _refused(wrong: Array, message: str, *, rows: bool = False) -> Array:
    """1, or NaN where a pair is wrong [B/2] and numbers are traced.

    Raises:
      ValueError: numbers are there to be told, and a pair is wrong.
    """
    some = jnp.any(wrong)
    if not isinstance(some, jax.core.Tracer) and some:
        i = int(jnp.argmax(wrong))
        raise ValueError(message.format(f"{2 * i} and {2 * i + 1}" if rows else i))
    return jnp.where(some, jnp.nan, 1.0)


def _mean(values: Array, counted: Array, count: Array) -> Array:
    return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(count, 1).astype(values.dtype)


def _check_positive(value: float, who: str, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{who}: {what} is a positive number, got {value!r}")
