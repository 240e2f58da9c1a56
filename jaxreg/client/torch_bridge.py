"""A composed objective as the callback that the SDK's own ``forward_backward_custom`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxreg.base.arrays import to_numpy
from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.client import wire
from jaxreg.client.evaluation import Evaluation, telling_of_failure
from jaxreg.client.local import Regularizers, as_objective, packed
from jaxreg.core.norms import GradNorms
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput

SideData = Sequence[Mapping[str, Any]] | Callable[[Sequence[Any]], Sequence[Mapping[str, Any]]]


class CustomLoss:
    """``callback(data, logprobs) -> (loss, metrics)`` in PyTorch's types; made by `as_custom_loss`.

    Attributes:
      output: what every term did in the last call; None before the first.
      state: what schedules and stateful terms carry on to the next call.
    """

    def __init__(
        self,
        objective: CompositeLoss,
        side_data: SideData | None,
        state: PyTree,
        key: Array | None,
        reduction: str | None,
    ) -> None:
        self.output: CustomLossOutput | None = None
        self.state = objective.init() if state is None else state
        self._objective = objective
        self._side_data = side_data
        self._key = key
        self._calls = 0
        self._suffix = f":{reduction}" if reduction else ""

    def __call__(self, data: Sequence[Any], logprobs: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """The loss, a torch scalar whose backward gives d(loss)/d(logprobs), and the flat metrics."""
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                "as_custom_loss speaks PyTorch, which the SDK's own hook needs: pip install torch; without "
                "it, use jaxreg.client.forward_backward_custom"
            ) from error

        with telling_of_failure(self._calls):
            side = self._side_data(data) if callable(self._side_data) else self._side_data
            rows = wire.read(data, side)
            arrays = [to_numpy(values).astype(np.float32) for values in logprobs]
            targets = [row[wire.TARGETS] for row in rows]
            _check_logprobs(arrays, targets)
            key = None if self._key is None else jax.random.fold_in(self._key, self._calls)
            batch = packed(rows)
            evaluation = Evaluation(self._objective, data, batch, targets, self.state, key, self._calls)
        evaluation.begin()
        try:
            done = evaluation.at(arrays)
        except BaseException as error:
            evaluation.fail(error)
            raise
        evaluation.stop()
        self.output, self.state = done.output, done.output.state
        self._calls += 1

        at = torch.cat([values.flatten() for values in logprobs])
        slope = torch.from_numpy(np.concatenate([g.ravel() for g in done.gradients])).to(at)
        # Linear in the logprobs, of value 0 here, and with exactly our gradient for a derivative.
        linear = torch.dot(at - at.detach(), slope)
        loss = linear + torch.tensor(float(done.output.loss_total), dtype=at.dtype, device=at.device)
        return loss, {f"{k}{self._suffix}": v for k, v in done.output.to_flat_dict().items()}


def as_custom_loss(
    objective: CompositeLoss | TermFn,
    *,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
    side_data: SideData | None = None,
    state: PyTree = None,
    key: Array | None = None,
    reduction: str | None = None,
) -> CustomLoss:
    """The objective as a callback for an SDK's own ``forward_backward_custom(data, callback)``.

    The SDK keeps its order of requests, its pipelining and its retries; the loss and its gradient come
    from the compiled objective. The bridge is one linear function in PyTorch, whose backward hands the
    gradient over, so it works with any SDK that has this hook.

    Args:
      objective, regularizers, track_grad_norms: as for `forward_backward_custom`.
      side_data: arrays for the terms that the datums do not carry: one mapping a datum, in their order,
        or a function of the datums that gives them. Tinker's SDK up to 0.25 refuses arrays in
        ``loss_fn_inputs`` that it does not know; later ones hand them to the callback.
      state: where to start for schedules and stateful terms; ``objective.init()`` by default. The
        callback carries it from call to call, as its attribute ``state``.
      key: a random key for terms that ask for one; every call gets its own.
      reduction: appended to the metrics' names, ``"mean"`` for ``reg/<name>/value:mean``, where the
        SDK's reducer needs one.

    Returns:
      A `CustomLoss`: call it, and read ``output`` for what every term did.

    Example:
      >>> import jaxreg as jr
      >>> callback = jr.client.as_custom_loss(
      ...     jr.losses.CrossEntropy(), regularizers=[dict(name="l1", fn=jr.regularizers.L1(), weight=0.1)])
      >>> # future = training_client.forward_backward_custom(data, callback)
    """
    composed = as_objective(objective, regularizers, track_grad_norms)
    return CustomLoss(composed, side_data, state, key, reduction)


def _check_logprobs(arrays: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
    if len(arrays) != len(targets):
        raise ValueError(f"the SDK gave {len(arrays)} logprobs arrays for {len(targets)} datums")
    for i, (array, target) in enumerate(zip(arrays, targets, strict=True)):
        if array.shape != target.shape:
            raise ValueError(
                f"datum {i}: its logprobs have shape {array.shape}, but {wire.TARGETS!r} has {target.shape}"
            )
    if found := wire.first_nonfinite(arrays):
        i, at, number = found
        raise ValueError(f"datum {i}: the server's logprob is {number} at {at}")
