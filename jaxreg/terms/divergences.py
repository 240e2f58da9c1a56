"""Divergences between whole distributions, without a residual of the vocabulary's size for every step of
them.

Written as a formula and differentiated by JAX, a divergence keeps four to eight arrays as large as the logits
at once. Each of these has its derivative in closed form, computed anew from the two inputs when it is wanted.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array
from jaxreg.terms.masked import not_infinite, plogp_ratio


class Kind(NamedTuple):
    """Which one: ``forward`` KL(p‖q), ``reverse`` KL(q‖p), ``symmetric`` their mean, ``js`` with its β."""

    name: Literal["forward", "reverse", "symmetric", "js"]
    beta: float = 0.5


FORWARD, REVERSE, SYMMETRIC = Kind("forward"), Kind("reverse"), Kind("symmetric")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def divergence(kind: Kind, x: Array, reference: Array) -> Array:
    """[...] of logits or logprobs x [..., V], p = softmax(x), and a reference, q, which gets no gradient.

    Slots where p = q = 0 add nothing. Where only the smaller side is 0 the divergence is +∞, and that slot
    has no part in the gradient.
    """
    return jnp.sum(_slots(kind, jax.nn.log_softmax(x), jax.nn.log_softmax(reference)), axis=-1)


@divergence.defjvp
def _divergence_jvp(
    kind: Kind, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # The barrier keeps XLA from holding what the value was computed with until the gradient is.
    x, reference = jax.lax.optimization_barrier(primals)
    slope = _slopes(kind, jax.nn.log_softmax(x, axis=-1), jax.nn.log_softmax(reference, axis=-1))
    return divergence(kind, *primals), jnp.sum(slope * tangents[0], axis=-1)


def _slots(kind: Kind, log_p: Array, log_q: Array) -> Array:
    if kind.name == "forward":
        return plogp_ratio(log_p, log_q)
    if kind.name == "reverse":
        return plogp_ratio(log_q, log_p)
    if kind.name == "symmetric":
        return 0.5 * (plogp_ratio(log_p, log_q) + plogp_ratio(log_q, log_p))
    middle, beta = _middle(kind.beta, log_p, log_q), kind.beta
    return (1 - beta) * plogp_ratio(log_p, middle) + beta * plogp_ratio(log_q, middle)


def _slopes(kind: Kind, log_p: Array, log_q: Array) -> Array:
    """The derivative with respect to each logit: p·(s − Σ p·s), with s = ∂/∂p."""
    if kind.name == "symmetric":
        return 0.5 * (_slopes(FORWARD, log_p, log_q) + _slopes(REVERSE, log_p, log_q))
    if kind.name == "reverse":
        q = jnp.where(_both(log_p, log_q), jnp.exp(log_q), 0.0)
        return jnp.exp(log_p) * jnp.sum(q, axis=-1, keepdims=True) - q
    against = log_q if kind.name == "forward" else _middle(kind.beta, log_p, log_q)
    both = _both(log_p, against)
    gap = jnp.where(both, log_p - against, 0.0)
    slope = jnp.exp(log_p) * (gap - jnp.sum(jnp.exp(log_p) * gap, axis=-1, keepdims=True))
    return slope if kind.name == "forward" else (1 - kind.beta) * slope


def _middle(beta: float, log_p: Array, log_q: Array) -> Array:
    """log((1 − β)p + βq)."""
    # logaddexp has NaN for a derivative where both are −∞: there nothing is to be added.
    some = not_infinite(log_p) | not_infinite(log_q)
    p, q = jnp.where(some, log_p, 0.0), jnp.where(some, log_q, 0.0)
    return jnp.where(some, jnp.logaddexp(p + math.log1p(-beta), q + math.log(beta)), -jnp.inf)


def _both(log_p: Array, log_q: Array) -> Array:
    return not_infinite(log_p) & not_infinite(log_q)
