"""The embedded trainer's default model: a small causal transformer in Flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree


class LanguageModel(nn.Module):
    """Logits [B, T, vocabulary] of tokens [B, T]."""

    vocabulary: int
    width: int = 64
    heads: int = 4
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """The logits of each next token."""
        table = nn.Embed(self.vocabulary, self.width, name="embed")
        x = table(tokens) + _positions(tokens.shape[1], self.width)[None]
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            seen = nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{i}")
            x = x + seen(nn.LayerNorm(name=f"norm_{i}a")(x), mask=mask)
            hidden = nn.Dense(4 * self.width, name=f"up_{i}")(nn.LayerNorm(name=f"norm_{i}b")(x))
            x = x + nn.Dense(self.width, name=f"down_{i}")(nn.gelu(hidden))
        return table.attend(nn.LayerNorm(name="norm")(x))


def small_model(vocabulary: int, seed: int) -> tuple[Callable[[PyTree, Array], Array], PyTree]:
    """The model as a function of params and tokens, and its first params."""
    model = LanguageModel(vocabulary)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))

    def apply(params: Any, tokens: Array) -> Any:
        return model.apply(params, tokens)

    return apply, params


def _positions(length: int, width: int) -> Array:
    """Sinusoids (Vaswani et al. 2017), so that any length will do."""
    rates = 1e4 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.outer(jnp.arange(length), rates)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
