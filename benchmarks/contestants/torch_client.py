"""Case "client" in PyTorch, as users of the remote SDK write it: `benchmarks.cases.client`. In the worker.

What the SDK's ``forward_backward_custom`` does itself around the callback (tensors out of the reply, weights
into new datums) is part of the step, as it is in ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

KEYS = ("target_tokens", "weights", "ref_logprobs", "logprobs", "advantages")
TERM_WEIGHTS = {"base": 1.0, "l1": 0.01, "entropy": 0.05, "kl": 0.1, "log_ratio": 0.03, "ppo": 0.5}
Step = Callable[[], dict[str, Any]]


class Tensor:
    """An SDK's tensor: an array that is handed out as a list."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def data(self) -> list[float]:
        return self.array.flatten().tolist()

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> Tensor:
        return cls(tensor.contiguous().numpy())


@dataclasses.dataclass(frozen=True)
class Datum:
    """What goes out."""

    loss_fn_inputs: dict[str, Tensor]


def terms_of(data: list[dict[str, Tensor]], logprobs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The six terms, all token means, written as a loop over datums."""
    count = torch.tensor(0.0, dtype=logprobs[0].dtype)
    sums = {name: torch.tensor(0.0, dtype=logprobs[0].dtype) for name in TERM_WEIGHTS}
    for datum, lp in zip(data, logprobs, strict=True):
        weights = torch.tensor(datum["weights"].data, dtype=lp.dtype)
        ref = torch.tensor(datum["ref_logprobs"].data, dtype=lp.dtype)
        sampler = torch.tensor(datum["logprobs"].data, dtype=lp.dtype)
        advantages = torch.tensor(datum["advantages"].data, dtype=lp.dtype)
        gap = ref - lp
        ratio = torch.exp(lp - sampler)
        clipped = torch.clamp(ratio, 0.8, 1.2)
        count = count + weights.sum()
        sums["base"] = sums["base"] - (weights * lp).sum()
        sums["l1"] = sums["l1"] + (weights * lp.abs()).sum()
        sums["entropy"] = sums["entropy"] + (weights * lp).sum()
        sums["kl"] = sums["kl"] + (weights * (torch.exp(gap) - gap - 1)).sum()
        sums["log_ratio"] = sums["log_ratio"] + (weights * gap**2).sum()
        sums["ppo"] = sums["ppo"] - (weights * torch.min(ratio * advantages, clipped * advantages)).sum()
    return {name: value / count for name, value in sums.items()}


def steps(arrays: Mapping[str, np.ndarray]) -> dict[str, Step]:
    """Steps by name."""
    lengths = arrays["lengths"].tolist()
    data = [{key: Tensor(arrays[key][i, :n]) for key in KEYS} for i, n in enumerate(lengths)]
    outputs = [Tensor(arrays["lp"][i, :n]) for i, n in enumerate(lengths)]

    def step(norms: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        logprobs = [torch.tensor(out.data, dtype=dtype).requires_grad_(True) for out in outputs]
        values = terms_of(data, logprobs)
        answer = {}
        if norms:
            for name, value in values.items():
                gradients = torch.autograd.grad(value, logprobs, retain_graph=True)
                answer[f"norm/{name}"] = torch.sqrt(sum((g**2).sum() for g in gradients))  # type: ignore[arg-type]
        loss = sum(TERM_WEIGHTS[name] * value for name, value in values.items())
        loss.backward()  # type: ignore[union-attr]
        sent = []
        for datum, lp in zip(data, logprobs, strict=True):
            assert lp.grad is not None
            sent.append(
                Datum({"target_tokens": datum["target_tokens"], "weights": Tensor.from_torch(-lp.grad)})
            )
        answer |= {f"value/{name}": value.detach() for name, value in values.items()}
        return answer | {
            "gradient": -torch.cat([torch.as_tensor(d.loss_fn_inputs["weights"].array) for d in sent])
        }

    return {
        "PyTorch, one autograd.grad a term": lambda: step(True),
        "PyTorch, no norms": lambda: step(False),
        "float64": lambda: step(True, torch.float64),
    }
