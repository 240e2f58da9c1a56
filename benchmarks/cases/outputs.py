"""Case "outputs": nine terms on the logprobs of a remote model, [64, 4096] in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases.problem import Batch, Problem

SHAPE = (64, 4096)
CLIP = 0.2  # of PPO's ratio


def problem(shape: tuple[int, int] = SHAPE) -> Problem:
    """The problem, with NumPy data."""
    x, batch = _draw(np.random.default_rng(0), shape)
    title = f"Nine terms on logprobs {list(shape)}, norms of d(term)/d(logprobs)"
    return Problem(title, TERMS, WEIGHTS, x, batch)


def masked_mean(values: jax.Array, batch: Batch) -> jax.Array:
    return jnp.sum(batch["mask"] * values) / jnp.sum(batch["mask"])


def cross_entropy(lp: jax.Array, batch: Batch) -> jax.Array:
    return -jnp.sum(batch["weights"] * lp) / jnp.sum(batch["mask"])


def l1(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean(jnp.abs(lp), batch)


def l2(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean(lp**2, batch)


def entropy(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean(-lp, batch)


def kl_k3(lp: jax.Array, batch: Batch) -> jax.Array:
    d = batch["ref_logprobs"] - lp
    return masked_mean(jnp.expm1(d) - d, batch)


def log_ratio_l2(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean((lp - batch["ref_logprobs"]) ** 2, batch)


def ppo_clip(lp: jax.Array, batch: Batch) -> jax.Array:
    ratio, advantages = jnp.exp(lp - batch["sampler_logprobs"]), batch["advantages"]
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -masked_mean(jnp.minimum(ratio * advantages, clipped * advantages), batch)


def focal(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean(-((1 - jnp.exp(lp)) ** 2) * lp, batch)


def unlikelihood(lp: jax.Array, batch: Batch) -> jax.Array:
    return masked_mean(-jnp.log1p(-jnp.exp(lp)), batch)


TERMS = {
    fn.__name__: fn
    for fn in (
        cross_entropy,
        l1,
        l2,
        entropy,
        kl_k3,
        log_ratio_l2,
        ppo_clip,
        focal,
        unlikelihood,
    )
}
WEIGHTS = (1.0, 0.01, 0.02, 0.05, 0.1, 0.03, 0.5, 0.2, 0.15)


def _draw(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logprobs in [-5, -0.05], 10 % of the tokens without weight, no ratio at the clip's kinks."""
    lp = rng.uniform(-5, -0.05, shape)
    away = rng.normal(scale=0.3, size=shape)
    for kink in (np.log(1 - CLIP), np.log(1 + CLIP)):
        away = np.where(np.abs(away - kink) < 1e-3, away + 4e-3, away)
    mask = rng.random(shape) >= 0.1
    batch = {
        "mask": mask,
        "weights": mask * rng.uniform(0.5, 1.5, shape),
        "ref_logprobs": lp + rng.normal(scale=0.3, size=shape),
        "sampler_logprobs": lp - away,
        "advantages": rng.normal(size=shape),
    }
    return lp.astype(np.float32), {k: v.astype(np.float32) for k, v in batch.items()}
