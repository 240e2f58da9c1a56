"""Case "outputs" in PyTorch, term by term as in `benchmarks.cases.outputs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

CLIP = 0.2
Batch = Mapping[str, Any]


def masked_mean(values: Any, batch: Batch) -> Any:
    return (batch["mask"] * values).sum() / batch["mask"].sum()


def cross_entropy(lp: Any, batch: Batch) -> Any:
    return -(batch["weights"] * lp).sum() / batch["mask"].sum()


def l1(lp: Any, batch: Batch) -> Any:
    return masked_mean(lp.abs(), batch)


def l2(lp: Any, batch: Batch) -> Any:
    return masked_mean(lp**2, batch)


def entropy(lp: Any, batch: Batch) -> Any:
    return masked_mean(-lp, batch)


def kl_k3(lp: Any, batch: Batch) -> Any:
    d = batch["ref_logprobs"] - lp
    return masked_mean(torch.expm1(d) - d, batch)


def log_ratio_l2(lp: Any, batch: Batch) -> Any:
    return masked_mean((lp - batch["ref_logprobs"]) ** 2, batch)


def ppo_clip(lp: Any, batch: Batch) -> Any:
    ratio, advantages = torch.exp(lp - batch["sampler_logprobs"]), batch["advantages"]
    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), batch)


def focal(lp: Any, batch: Batch) -> Any:
    return masked_mean(-((1 - torch.exp(lp)) ** 2) * lp, batch)


def unlikelihood(lp: Any, batch: Batch) -> Any:
    return masked_mean(-torch.log1p(-torch.exp(lp)), batch)


TERMS = (cross_entropy, l1, l2, entropy, kl_k3, log_ratio_l2, ppo_clip, focal, unlikelihood)


def load(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], Callable[[], list[Any]]]:
    """The leaf that is differentiated, and a function that gives every term's value."""
    x = torch.tensor(arrays["x"], requires_grad=True)
    batch = {k.removeprefix("batch/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("batch/")}
    return {"gradient": x}, lambda: [term(x, batch) for term in TERMS]
