"""Case "params": six terms on the logits of a small transformer, norms in parameter space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import transformer
from benchmarks.cases.problem import Batch, Problem, PyTree

BATCH = 8


def problem() -> Problem:
    """The problem, with NumPy data."""
    rng = np.random.default_rng(0)
    shape = (BATCH, transformer.LENGTH)
    batch = {
        "tokens": rng.integers(transformer.VOCABULARY, size=shape).astype(np.int32),
        "targets": rng.integers(transformer.VOCABULARY, size=shape).astype(np.int32),
        "ref_logits": rng.normal(size=(*shape, transformer.VOCABULARY)).astype(np.float32),
    }
    title = (
        f"Six terms on the logits of a transformer ({transformer.LAYERS} layers, "
        f"{transformer.WIDTH} wide, {transformer.HEADS} heads, {transformer.VOCABULARY} words; batch "
        f"{BATCH} × {transformer.LENGTH}), norms of d(term)/d(params)"
    )
    params = transformer.initial_params(rng)
    return Problem(title, TERMS, WEIGHTS, params, batch, forward)


def forward(params: PyTree, batch: Batch) -> jax.Array:
    return transformer.logits(params, batch["tokens"])


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1))


def entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def kl_to_reference(logits: jax.Array, batch: Batch) -> jax.Array:
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(batch["ref_logits"])
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def z_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def l1(logits: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(jnp.abs(logits))


def l2(logits: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(logits**2)


TERMS = {fn.__name__: fn for fn in (cross_entropy, entropy, kl_to_reference, z_loss, l1, l2)}
WEIGHTS = (1.0, 0.1, 0.1, 0.001, 0.01, 0.01)
