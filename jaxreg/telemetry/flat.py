"""A report's numbers by flat name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("value", "weight", "contribution", "grad_norm", "grad_norm_weighted")


def flat(report: Mapping[str, Any]) -> dict[str, float | None]:
    """``to_dict()`` by the names of ``to_flat_dict()``; None where there is no number.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> _, out = jr.compose(lambda x, batch: jnp.sum(x))(jnp.ones(3))
      >>> flat(out.to_dict())["loss/total"], flat(out.to_dict())["grad_norm/total"]
      (3.0, None)
    """
    base = report["base_loss"]
    numbers = {
        "loss/total": report["loss_total"],
        "loss/base": base["value"],
        "loss/regularizer_total": report["regularizer_total"],
        "grad_norm/total": report["total_grad_norm"],
        "grad_norm/base": base["grad_norm"],
    }
    numbers |= {f"loss/base/{key}": value for key, value in base["custom"].items()}
    for name, term in report["regularizers"].items():
        prefix = f"reg/{name}/"
        for key in KEYS:
            numbers[prefix + key] = term[key]
        for key, value in term["custom"].items():
            numbers[prefix + key] = value
    return numbers
