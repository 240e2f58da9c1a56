"""How PyTorch users combine the terms' gradients by UPGrad: TorchJD. Runs in the worker."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import torch_outputs, torch_params
from benchmarks.contestants.in_torch import AUTOJAC, PLAIN, Step, Values, plain
from benchmarks.measure.reference import REG_EPS

AT_LOGITS = "TorchJD's UPGrad at the logits by hand"


def contestants(case: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by name, and reasons by name for those that cannot take part."""
    weights = arrays["weights"].tolist()
    if case == "outputs":
        leaves, values = torch_outputs.load(arrays)
    else:
        leaves, values, model = torch_params.load(arrays)
    steps = {PLAIN: plain(leaves, values, weights)}
    if importlib.util.find_spec("torchjd") is None:
        return steps, {AUTOJAC: "torchjd cannot be imported"}
    space = "upgrad outputs" if case == "outputs" else "upgrad params"
    for name, rows in {"": None, ", parallel_chunk_size=1": 1}.items():
        steps[f"{AUTOJAC} + UPGrad{name}"] = autojac(leaves, values, weights, rows, space)
    if case == "params":
        steps[AT_LOGITS] = at_logits(leaves, values, weights, model)
    return steps, {}


def autojac(
    leaves: Mapping[str, Any], values: Values, weights: list[float], rows: int | None, space: str
) -> Step:
    """As TorchJD's documentation has it: the Jacobian into the leaves, aggregated into their gradients."""
    from torchjd.autojac import backward, jac_to_grad

    w, aggregator = torch.tensor(weights), _aggregator(len(weights))

    def step() -> dict[str, Any]:
        terms = values()
        for leaf in leaves.values():
            leaf.grad = None
        backward(list(w * torch.stack(terms)), parallel_chunk_size=rows)
        jac_to_grad(list(leaves.values()), aggregator)
        return {"values": torch.stack(terms).detach()} | _renamed(leaves, space)

    return step


def at_logits(leaves: Mapping[str, Any], values: Values, weights: list[float], model: Any) -> Step:
    """What its users may write to combine where it is cheap: one backward of the model."""
    w, aggregator = torch.tensor(weights), _aggregator(len(weights))
    kept: list[Any] = []
    model.register_forward_hook(lambda module, inputs, outputs: kept.append(outputs))

    def step() -> dict[str, Any]:
        kept.clear()
        terms = values()
        (logits,) = kept
        rows = [
            torch.autograd.grad(weight * term, logits, retain_graph=True)[0]
            for weight, term in zip(w, terms, strict=True)
        ]
        direction = aggregator(torch.stack(rows).flatten(1)).view_as(logits)
        gradients = torch.autograd.grad(logits, list(leaves.values()), direction)
        found = {f"upgrad outputs/{_leaf(name)}": g for name, g in zip(leaves, gradients, strict=True)}
        return {"values": torch.stack(terms).detach()} | found

    return step


def _aggregator(count: int) -> Any:
    from torchjd.aggregation import UPGrad
    from torchjd.linalg import QuadprogProjector

    return UPGrad(pref_vector=torch.ones(count), projector=QuadprogProjector(norm_eps=0.0, reg_eps=REG_EPS))


def _renamed(leaves: Mapping[str, Any], space: str) -> dict[str, Any]:
    return {f"{space}/{_leaf(name)}".rstrip("/"): leaf.grad for name, leaf in leaves.items()}


def _leaf(name: str) -> str:
    return name.removeprefix("gradient").removeprefix("/")
