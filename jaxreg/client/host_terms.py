"""What the host terms gave, added to what the compiled program gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.client.errors import NonFiniteGradient
from jaxreg.client.wire import first_nonfinite
from jaxreg.client.work import Evaluated, Work
from jaxreg.core.output import CustomLossOutput, RegularizerOutput
from jaxreg.host.calls import HostResult
from jaxreg.host.rows import masked


def joined(work: Work, done: Evaluated, results: Mapping[str, HostResult]) -> Evaluated:
    """The sum of both.

    Raises:
      NonFiniteGradient: a weight makes a host term's gradient so, or the sum overflows.
    """
    output, gradients = done.output, [np.array(gradient) for gradient in done.gradients]
    masks = work.packed.batch.unpack(work.packed.batch.mask)
    terms = dict(output.regularizers)
    added = 0.0
    for name, result in results.items():
        weight = work.weights[name]
        slopes = [masked(slope, mask) for slope, mask in zip(result.gradient or (), masks, strict=False)]
        terms[name] = _report(name, weight, result, slopes, output)
        added += float(terms[name].contribution)
        with np.errstate(over="ignore", invalid="ignore"):
            for i, slope in enumerate(slopes):
                gradients[i] += weight * slope
        if slopes and (found := first_nonfinite(gradients)):
            culprit = f"term {name!r} at its weight of {weight:g}, or from the sum with the terms before it"
            raise NonFiniteGradient.at(found, culprit, (name,))
    output = output.replace(  # type: ignore[attr-defined]
        loss_total=np.float32(float(output.loss_total) + added),
        regularizers=type(output.regularizers)((name, terms[name]) for name in work.names),
        regularizer_total=np.float32(float(output.regularizer_total) + added),
        total_grad_norm=None if output.total_grad_norm is None else np.float32(_norm(gradients)),
    )
    return Evaluated(output, gradients)


def _report(
    name: str, weight: np.float32, result: HostResult, slopes: list[np.ndarray], compiled: CustomLossOutput
) -> RegularizerOutput:
    """As a compiled term's: norms where those are tracked."""
    norm = by_datum = None
    if compiled.total_grad_norm is not None:
        norm = np.float32(_norm(slopes))
        if (like := compiled.base_loss.grad_norm_per_datum) is not None:
            by_datum = np.zeros(np.shape(like), np.float32)
            by_datum[: len(slopes)] = [_norm([slope]) for slope in slopes]
    fields: dict[str, Any] = {
        "value": np.float32(result.value),
        "weight": weight,
        "contribution": weight * np.float32(result.value),
        "grad_norm": norm,
        "grad_norm_weighted": None if norm is None else weight * norm,
        "custom": {key: np.float32(number) for key, number in result.metrics.items()},
        "grad_norm_per_datum": by_datum,
    }
    return RegularizerOutput(name=name, **fields)


def _norm(gradient: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in gradient)))
