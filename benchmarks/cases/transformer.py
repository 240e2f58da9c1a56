"""A GPT-2-style transformer in plain JAX: pre-layer-norm, learned positions, tied head."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 4, 256, 8, 2048, 128
Params = Mapping[str, jax.Array]


def initial_params(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A flat dict; matrices are [in, out]."""
    params = {
        "tokens": rng.normal(scale=0.02, size=(VOCABULARY, WIDTH)),
        "positions": rng.normal(scale=0.01, size=(LENGTH, WIDTH)),
    }
    matrices = {"qkv": (1, 3), "proj": (1, 1), "up": (1, 4), "down": (4, 1)}
    for i in range(LAYERS):
        for name, (ins, outs) in matrices.items():
            size = (ins * WIDTH, outs * WIDTH)
            params[f"h{i}.{name}.w"] = rng.normal(scale=size[0] ** -0.5, size=size)
            params[f"h{i}.{name}.b"] = rng.normal(scale=0.01, size=size[1])
    for name in [f"h{i}.ln{j}" for i in range(LAYERS) for j in (1, 2)] + ["ln"]:
        params[f"{name}.w"] = 1 + rng.normal(scale=0.05, size=WIDTH)
        params[f"{name}.b"] = rng.normal(scale=0.05, size=WIDTH)
    return {name: array.astype(np.float32) for name, array in params.items()}


def logits(params: Params, tokens: jax.Array) -> jax.Array:
    """Tokens [B, T] to logits [B, T, V]; a matrix "head" unties the head from the embedding."""
    x = params["tokens"][tokens] + params["positions"]
    for i in range(LAYERS):
        x = x + _attention(params, f"h{i}", _layer_norm(params, f"h{i}.ln1", x))
        up = _affine(params, f"h{i}.up", _layer_norm(params, f"h{i}.ln2", x))
        x = x + _affine(params, f"h{i}.down", jax.nn.gelu(up, approximate=True))
    return _layer_norm(params, "ln", x) @ params.get("head", params["tokens"]).T


def _affine(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.w"] + params[f"{name}.b"]


def _layer_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params[f"{name}.w"] + params[f"{name}.b"]


def _attention(params: Params, name: str, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = _affine(params, f"{name}.qkv", x).reshape(batch, length, 3, HEADS, width // HEADS)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // HEADS) ** -0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return _affine(params, f"{name}.proj", mixed.reshape(batch, length, width))
