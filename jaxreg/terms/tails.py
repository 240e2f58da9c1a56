"""What becomes of the rest of two distributions that are known at K words of a vocabulary only."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array
from jaxreg.terms.divergences import Kind, divergence
from jaxreg.terms.masked import not_infinite

Tail: TypeAlias = Literal["renormalize", "bucket", "ignore"]
TAILS = ("renormalize", "bucket", "ignore")


def with_bucket(logprobs: Array, counted: Array) -> Array:
    """[..., K + 1]: the slots that count (−∞ in the others), and the logarithm of all the rest, 1 − Σ.

    Not normalised: the rest is at least the dtype's rounding error of 1 (1.2e-7 in float32), with no gradient
    below: that is as exact as Σ itself, which may come out above 1.
    """
    slots = jnp.where(counted, logprobs, -jnp.inf)
    some = jnp.any(not_infinite(slots), axis=-1, keepdims=True)
    log_mass = jax.nn.logsumexp(jnp.where(some, slots, 0.0), axis=-1, keepdims=True)
    rest = jnp.where(some, -jnp.expm1(jnp.where(some, log_mass, -1.0)), 1.0)
    floor = jnp.finfo(rest.dtype).eps
    log_rest = jnp.log(jnp.where(rest < floor, floor, rest))
    return jnp.concatenate([slots, log_rest], axis=-1)


def divergence_of_slots(kind: Kind, log_p: Array, log_q: Array) -> Array:
    """`divergence` of slots, which it normalises.

    Where one side has no slot at all it is 0, or +∞, where it is KL(q‖p) and the side is the model's.
    """
    p_some, q_some = (jnp.any(not_infinite(a), axis=-1, keepdims=True) for a in (log_p, log_q))
    both = p_some & q_some
    value = divergence(kind, jnp.where(both, log_p, 0.0), jnp.where(both, log_q, 0.0))
    lost = (q_some & ~p_some)[..., 0] & (kind.name == "reverse")
    return at_least_zero(jnp.where(both[..., 0], value, jnp.where(lost, jnp.inf, 0.0)))


def at_least_zero(divergence: Array) -> Array:
    """The divergence without the rounding error that puts one of (nearly) equal sides below 0."""
    return divergence + jax.lax.stop_gradient(jnp.where(divergence < 0, -divergence, 0.0))
