"""Case "params" in PyTorch: the model of `benchmarks.cases.transformer` and the terms of `params`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HEADS = 8


class Affine(nn.Module):
    """GPT-2's own layout: the matrix is [in, out]."""

    def __init__(self, w: Any, b: Any) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x: Any) -> Any:
        return torch.addmm(self.b, x.flatten(0, 1), self.w).unflatten(0, x.shape[:2])


class LayerNorm(nn.Module):
    def __init__(self, w: Any, b: Any) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, x.shape[-1:], self.w, self.b)


class Positions(nn.Module):
    def __init__(self, w: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Any) -> Any:
        return x + self.w


class Tokens(nn.Module):
    """Embedding of tokens, or the head's logits: a tied matrix is one module's."""

    def __init__(self, w: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Any) -> Any:
        return x @ self.w.T if x.is_floating_point() else F.embedding(x, self.w)


class Block(nn.Module):
    def __init__(self, arrays: Mapping[str, Any]) -> None:
        super().__init__()
        self.ln1, self.ln2 = (LayerNorm(*_pair(arrays, name)) for name in ("ln1", "ln2"))
        self.qkv, self.proj = (Affine(*_pair(arrays, name)) for name in ("qkv", "proj"))
        self.up, self.down = (Affine(*_pair(arrays, name)) for name in ("up", "down"))

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))

    def attention(self, x: Any) -> Any:
        width = x.shape[-1] // HEADS
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, width)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * width**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(-2))


def _pair(arrays: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    return arrays[f"{name}.w"], arrays[f"{name}.b"]


class Transformer(nn.Module):
    """Submodules are named so that a parameter has (nearly) the same name here and in JAX."""

    def __init__(self, arrays: Mapping[str, Any], tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = Tokens(arrays["tokens"]), Positions(arrays["positions"])
        self.ln = LayerNorm(arrays["ln.w"], arrays["ln.b"])
        self.head = self.tokens if tied else Tokens(arrays["tokens"].clone())
        self.blocks = [f"h{i}" for i in range(sum(name.endswith(".qkv.w") for name in arrays))]
        for block in self.blocks:
            prefix = f"{block}."
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            self.add_module(block, Block(own))

    def forward(self, tokens: Any) -> Any:
        x = self.positions(self.tokens(tokens))
        for block in self.blocks:
            x = self.get_submodule(block)(x)
        return self.head(self.ln(x))


def cross_entropy(logits: Any, batch: Mapping[str, Any]) -> Any:
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def entropy(logits: Any, batch: Mapping[str, Any]) -> Any:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def kl_to_reference(logits: Any, batch: Mapping[str, Any]) -> Any:
    log_p, log_q = logits.log_softmax(-1), batch["ref_logits"].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def z_loss(logits: Any, batch: Mapping[str, Any]) -> Any:
    return (logits.logsumexp(-1) ** 2).mean()


def l1(logits: Any, batch: Mapping[str, Any]) -> Any:
    return logits.abs().mean()


def l2(logits: Any, batch: Mapping[str, Any]) -> Any:
    return (logits**2).mean()


TERMS = (cross_entropy, entropy, kl_to_reference, z_loss, l1, l2)


def load(
    arrays: Mapping[str, np.ndarray], *, tied: bool = True
) -> tuple[dict[str, Any], Callable[[], list[Any]], Transformer]:
    """The parameters by their names in JAX, a function that gives every term's value, the model."""
    params = {k.removeprefix("x/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("x/")}
    model = Transformer(params, tied)
    names = {f"{name}.w": name for name in ("tokens", "positions", "head")}
    leaves = {f"gradient/{names.get(name, name)}": p for name, p in model.named_parameters()}
    batch = {k.removeprefix("batch/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("batch/")}
    batch |= {name: batch[name].long() for name in ("tokens", "targets")}

    def values() -> list[Any]:
        logits = model(batch["tokens"])
        return [term(logits, batch) for term in TERMS]

    return leaves, values, model
