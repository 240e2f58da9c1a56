"""What goes in and out, for programs without an SDK. The SDK's own types work everywhere as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreg.base import html
from jaxreg.base.shown import never_fails
from jaxreg.core.output import CustomLossOutput


@dataclasses.dataclass(frozen=True)
class Datum:
    """One example: what the model reads and what the loss reads.

    Args:
      model_input: the tokens, [T] integers (or an SDK's ``ModelInput``).
      loss_fn_inputs: arrays by name, [T], [T, K] or scalars; ``target_tokens`` always. ``weights``, [T] or
        [T, K], says how much each target counts: 0 for a prompt's, 1 for all by default. What else there
        is reaches the terms by its name, and never the server.

    Example:
      >>> import jaxreg as jr
      >>> datum = jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})
      >>> sorted(datum.loss_fn_inputs)
      ['target_tokens']
    """

    model_input: Any
    loss_fn_inputs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AdamParams:
    """Settings of one AdamW step, with the remote API's names and defaults.

    Args:
      learning_rate, beta1, beta2, eps, weight_decay: as in ``optax.adamw``.
      grad_clip_norm: the gradient's norm is clipped to it; 0 for no clipping.

    Example:
      >>> import jaxreg as jr
      >>> jr.client.AdamParams(learning_rate=3e-4, grad_clip_norm=1.0).beta2
      0.95
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: no clipping


@dataclasses.dataclass(frozen=True)
class ForwardBackwardOutput:
    """A server's answer to a forward or a forward-backward request."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, Any]]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far logprobs moved between the pass that the gradient is from and the backward request.

    Attributes:
      mean: mean absolute difference over the tokens that count, in nats.
      max: the largest one.
    """

    mean: float
    max: float


@dataclasses.dataclass(frozen=True)
class CustomResult:
    """One step with a remote model.

    Attributes:
      output: what every term did.
      metrics: the same by flat names (``reg/<name>/value``, ...), with the server's own merged in.
      logprobs: what the objective was evaluated at, one array [T] or [T, K] a datum.
      drift: the difference to the logprobs that came back with the gradient; None where none did.
      reply: the server's own answer.
    """

    output: CustomLossOutput
    metrics: dict[str, float]
    logprobs: list[np.ndarray]
    drift: Drift | None
    reply: Any

    def __repr__(self) -> str:
        return f"{_summary(self)}\n{self.output!r}"

    @never_fails
    def _repr_html_(self) -> str:
        return html.line(_summary(self)) + self.output._repr_html_()

    @property
    def loss_fn_outputs(self) -> Any:
        """The server's outputs, as the SDK's result has them."""
        return self.reply.loss_fn_outputs


def _summary(result: CustomResult) -> str:
    tokens = sum(np.size(logprobs) for logprobs in result.logprobs)
    drift = (
        ""
        if result.drift is None
        else f", drift {result.drift.mean:.3g} nats (at most {result.drift.max:.3g})"
    )
    datums = "1 datum" if len(result.logprobs) == 1 else f"{len(result.logprobs)} datums"
    return f"CustomResult of {datums}, {tokens} logprobs{drift}"
