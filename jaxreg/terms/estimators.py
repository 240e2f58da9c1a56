"""Estimates from sampled tokens whose gradient is that of what they estimate.

The mean of f(y) over tokens y drawn from p estimates E_p[f]. Differentiating f alone (``"pathwise"``) leaves
out that p itself, so which tokens are drawn, depends on the parameters, too. The score function puts it back
(Williams 1992): ∇E_p[f] = E_p[f·∇log p + ∇f]. What is drawn from another distribution s is weighted by p/s.

Each estimate is given by its value and its slope, the factor of ∇lp that is wanted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.terms.inputs import read_folded
from jaxreg.terms.masked import check_choice, not_infinite
from jaxreg.terms.ratios import ratio_of
from jaxreg.terms.term import Source

Gradient: TypeAlias = Literal["score", "pathwise"]
GRADIENTS = ("score", "pathwise")


class OffPolicy(NamedTuple):
    """How the tokens were drawn, where not from the learner: lp − s, and where it is finite."""

    log_ratio: Array
    counted: Array


def check_gradient(gradient: str | None, who: str) -> None:
    """Refuse what is neither a gradient nor None."""
    if gradient is not None:
        check_choice(gradient, GRADIENTS, who, "gradient")


def off_policy(
    sampler: Source | None,
    tokens: TokenBatch,
    logprobs: Array,
    shape: tuple[int, ...],
    who: str,
    *,
    trailing: int = 0,
) -> OffPolicy | None:
    """lp − s of the sampler's logprobs s, read as `read_folded` does; None without a sampler."""
    if sampler is None:
        return None
    drawn = read_folded(sampler, tokens, shape, who, "the sampler's logprobs", trailing=trailing)
    counted = not_infinite(logprobs) & not_infinite(drawn)
    here = jax.lax.stop_gradient(logprobs)
    return OffPolicy(jnp.where(counted, here, 0.0) - jnp.where(counted, drawn, 0.0), counted)


def estimated(value: Array, logprobs: Array, slope: Array, off: OffPolicy | None = None) -> Array:
    """The value, with the gradient slope·∇lp; of tokens drawn by another, r·slope·∇lp.

    Where lp or the slope is infinite there is no gradient.
    """
    counted = not_infinite(logprobs) & not_infinite(slope)
    slope = jax.lax.stop_gradient(jnp.where(counted, slope, 0.0))
    if off is not None:
        slope = jnp.where(off.counted, slope * ratio_of(off.log_ratio, slope), 0.0)
    lp = jnp.where(counted, logprobs, 0.0)
    # 0 with a derivative: of lp alone, so that no product of a large slope with a large lp overflows.
    return jax.lax.stop_gradient(value) + slope * (lp - jax.lax.stop_gradient(lp))
