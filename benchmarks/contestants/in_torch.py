"""How PyTorch users get the norms: plain autograd, and TorchJD. Runs in the worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import torch_client, torch_outputs, torch_params

Step = Callable[[], dict[str, Any]]  # -> tensors: "values", "norms", one "gradient..." a leaf
Values = Callable[[], list[Any]]

PLAIN = "PyTorch, plain step, no norms"
AUTOGRAD = "PyTorch, one autograd.grad a term"
AUTOJAC = "TorchJD autojac"
AUTOJAC_BY_ROW = "TorchJD autojac, parallel_chunk_size=1"
AUTOGRAM = "TorchJD autogram"
AUTOGRAM_UNTIED = "TorchJD autogram, head untied"  # so its norms are others, and checked as such


def contestants(case: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by name, and reasons by name for those that cannot take part."""
    if case == "client":
        return torch_client.steps(arrays), {}
    weights = arrays["weights"].tolist()
    has_torchjd = importlib.util.find_spec("torchjd") is not None
    if case == "outputs":
        leaves, values = torch_outputs.load(arrays)
        steps = {
            PLAIN: plain(leaves, values, weights),
            AUTOGRAD: autograd_besides(leaves, values, weights),
        }
        skipped = {AUTOGRAM: "its Engine differentiates a model's parameters; here is no model"}
    else:
        leaves, values, model = torch_params.load(arrays)
        steps = {
            PLAIN: plain(leaves, values, weights),
            AUTOGRAD: autograd(leaves, values, weights),
        }
        skipped = {}
        if has_torchjd:
            steps[AUTOGRAM] = autogram(leaves, values, weights, model)
            steps[AUTOGRAM_UNTIED] = _tie_again(
                autogram(*(untied := torch_params.load(arrays, tied=False))[:2], weights, untied[2])
            )
    if not has_torchjd:
        return steps, dict.fromkeys((AUTOJAC, AUTOGRAM), "torchjd cannot be imported")
    steps[AUTOJAC] = autojac(leaves, values, weights, None)
    steps[AUTOJAC_BY_ROW] = autojac(leaves, values, weights, 1)
    return steps, skipped


def plain(leaves: Mapping[str, Any], values: Values, weights: list[float]) -> Step:
    """The weighted sum's gradient, and no norms."""
    w = torch.tensor(weights)

    def step() -> dict[str, Any]:
        terms = torch.stack(values())
        return {"values": terms.detach()} | _gradients(leaves, w @ terms)

    return step


def autograd_besides(leaves: Mapping[str, Any], values: Values, weights: list[float]) -> Step:
    """As custom losses for a remote model are written: a gradient a term, then the total's."""
    w = torch.tensor(weights)

    def step() -> dict[str, Any]:
        terms = values()
        norms = [_norm(_gradients(leaves, term, retain_graph=True).values()) for term in terms]
        total = _gradients(leaves, w @ torch.stack(terms))
        return {"values": _detached(terms), "norms": torch.stack(norms)} | total

    return step


def autograd(leaves: Mapping[str, Any], values: Values, weights: list[float]) -> Step:
    """A gradient a term; their weighted sum is the total's."""

    def step() -> dict[str, Any]:
        terms = values()
        norms, total = [], {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
            gradients = _gradients(leaves, term, retain_graph=i < len(terms) - 1)
            norms.append(_norm(gradients.values()))
            torch._foreach_add_(list(total.values()), list(gradients.values()), alpha=weight)
        return {"values": _detached(terms), "norms": torch.stack(norms)} | total

    return step


def autojac(leaves: Mapping[str, Any], values: Values, weights: list[float], rows: int | None) -> Step:
    """TorchJD's Jacobian of the terms, all rows at once (None) or some at a time."""
    from torchjd.autojac import jac

    w = torch.tensor(weights)

    def step() -> dict[str, Any]:
        terms = values()
        jacobians = jac(terms, list(leaves.values()), parallel_chunk_size=rows)
        squares = [j.flatten(1).square().sum(1) for j in jacobians]
        total = [torch.tensordot(w, j, dims=1) for j in jacobians]
        norms = torch.stack(squares).sum(0).sqrt()
        return {"values": _detached(terms), "norms": norms} | dict(zip(leaves, total, strict=True))

    return step


def autogram(leaves: Mapping[str, Any], values: Values, weights: list[float], model: Any) -> Step:
    """TorchJD's Gramian, whose diagonal holds the squared norms, and then one backward."""
    from torchjd.autogram import Engine

    w, engine = torch.tensor(weights), Engine(model, batch_dim=None)

    def step() -> dict[str, Any]:
        terms = torch.stack(values())
        norms = engine.compute_gramian(terms).diagonal().sqrt()
        return {"values": terms.detach(), "norms": norms} | _gradients(leaves, w @ terms)

    return step


def _tie_again(step: Step) -> Step:
    """The tied gradient of an untied step, whose norms remain those of the untied model."""

    def tied() -> dict[str, Any]:
        result = step()
        result["gradient/tokens"] = result["gradient/tokens"] + result.pop("gradient/head")
        result["untied norms"] = result.pop("norms")
        return result

    return tied


def _gradients(leaves: Mapping[str, Any], value: Any, *, retain_graph: bool = False) -> dict[str, Any]:
    gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=retain_graph)
    return dict(zip(leaves, gradients, strict=True))


def _norm(gradients: Any) -> Any:
    # torch.norm adds up float32 naively: 1.3e-4 off on [64, 4096], where this is not.
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()


def _detached(terms: list[Any]) -> Any:
    return torch.stack(terms).detach()
