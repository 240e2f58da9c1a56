"""One training step on a model that somebody else runs: the loss here, forward and backward there."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jaxreg.base.types import Array, PyTree, TermFn
from jaxreg.client.ask import Ask, Options, Regularizers, as_objective, step_of
from jaxreg.client.finish import CustomFuture
from jaxreg.client.requests import arrival, at_once, called, wait
from jaxreg.client.step import take_step
from jaxreg.core.norms import GradNorms
from jaxreg.core.objective import CompositeLoss


def forward_backward_custom(
    client: Any,
    data: Sequence[Any],
    objective: CompositeLoss | TermFn,
    *,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
    logprobs: Sequence[Any] | None = None,
    max_drift: float = 0.05,
    on_drift: Literal["warn", "raise", "ignore"] = "warn",
    top_k: Literal["native", "unrolled"] = "native",
    state: PyTree = None,
    key: Array | None = None,
    timeout: float | None = None,
    step: int | None = None,
    requests: int = 1,
    totals_of: Sequence[Any] | None = None,
) -> CustomFuture:
    """Forward there, loss and gradient here, backward there.

    The server computes the logprobs of ``target_tokens``; the objective is evaluated and differentiated
    at them by one compiled program; and −d(loss)/d(logprobs) goes back as the weights of the server's
    linear cross-entropy, ``Σ −weight·logprob``, whose gradient in the model's parameters is then that of
    the objective. Two requests; with ``logprobs=``, one.

    **Order.** The call returns when the backward request has been handed to the client (the SDK numbers
    its requests then), so an ``optim_step`` that is issued after it comes after it, whatever the order in
    which replies arrive. It therefore waits for the forward's reply. Inside an event loop use
    `forward_backward_custom_async`, which waits without blocking the loop.

    Nothing is sent twice: retries are the SDK's business.

    Args:
      client: anything with ``forward(data, loss_fn)`` and ``forward_backward(data, loss_fn)`` that return
        futures, such as the Tinker SDK's ``TrainingClient`` or `EmbeddedTrainingClient`.
      data: the API's datums. Every array in ``loss_fn_inputs`` reaches the terms by its name, as
        ``batch[name]``; the server gets ``target_tokens`` ([T], or [T, K] for the top K), weights, and
        what else the datum has beside ``loss_fn_inputs``.
      objective: made by `compose`, or a base loss, to go with ``regularizers=`` and ``track_grad_norms=``;
        it is then composed once and remembered.
      logprobs: one array a datum, of ``target_tokens``' shape: logprobs that the current weights gave when
        the data was sampled. The forward request is then left out. What comes back with the gradient is
        compared with them.
      max_drift: by how many nats the logprobs may differ, in the mean over the tokens that count.
      on_drift: past it, ``"warn"``, ``"raise"`` `LogprobDrift` (the gradient is applied by then: load a
        saved state), or ``"ignore"``. The difference stands in the result as ``drift`` in any case.
      top_k: how targets [T, K] are sent: ``"native"``, as they are; ``"unrolled"``, as K datums of [T], for
        servers that know one target a token (at the cost of K passes there).
      state: for schedules and stateful terms: ``objective.init()``, then ``result.output.state``.
      key: a random key, for terms that ask for one.
      timeout: seconds to wait for the reply to the forward request.
      step: the training step, for `jaxreg.telemetry`; by default, how many this client has taken.
      requests: how many requests the datums are sent in, forward and backward, where one would be too large.
        The objective is evaluated on all of them at once, so that nothing depends on the number.
      totals_of: where the data is a part of a batch (of several processes, or calls before one
        ``optim_step``): all datums of it. The parts' values and gradients then add up to the whole's, for
        terms that say so (``additive``, see `RegularizerSpec`); `jaxreg.merge_outputs` adds up their reports.

    Returns:
      A `CustomFuture` of a `CustomResult`: ``.result()``, or ``await`` it.

    Raises:
      TypeError, ValueError: something is wrong with the data, before anything is sent.
      RemoteError: with the step that failed and whether a gradient may have been applied.

    Example:
      >>> import jaxreg as jr
      >>> client = jr.client.EmbeddedTrainingClient(vocabulary=16)
      >>> data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})]
      >>> entropy = dict(name="entropy", fn=jr.regularizers.Entropy(), weight=0.1)
      >>> step = jr.client.forward_backward_custom(
      ...     client, data, jr.losses.CrossEntropy(), regularizers=[entropy])
      >>> _ = client.optim_step(jr.client.AdamParams(learning_rate=1e-2))
      >>> sorted(step.result().output.regularizers)
      ['entropy']
    """
    if _would_block_a_loop():
        raise RuntimeError(
            "forward_backward_custom waits for the server, which would block the running event loop; say "
            "`future = await jaxreg.client.forward_backward_custom_async(...)`"
        )
    composed = as_objective(objective, regularizers, track_grad_norms)
    ask = Ask(client, data, composed, logprobs=logprobs, state=state, key=key, step=step_of(client, step))
    ask = ask._replace(totals_of=totals_of)
    options = Options(top_k, timeout, max_drift, on_drift, requests)
    return at_once(take_step(ask, options, called, functools.partial(called, wait)))


async def forward_backward_custom_async(
    client: Any,
    data: Sequence[Any],
    objective: CompositeLoss | TermFn,
    *,
    regularizers: Regularizers | None = None,
    track_grad_norms: bool | GradNorms | None = None,
    logprobs: Sequence[Any] | None = None,
    max_drift: float = 0.05,
    on_drift: Literal["warn", "raise", "ignore"] = "warn",
    top_k: Literal["native", "unrolled"] = "native",
    state: PyTree = None,
    key: Array | None = None,
    timeout: float | None = None,
    step: int | None = None,
    requests: int = 1,
    totals_of: Sequence[Any] | None = None,
) -> CustomFuture:
    """`forward_backward_custom` for event loops.

    ``future = await forward_backward_custom_async(...)`` comes back when the backward request has been
    handed to the client, and ``result = await future`` with the reply. Compiling and computing happen in
    a thread. Cancelled before the backward request is handed over, it sends none.

    Example:
      >>> import asyncio, jaxreg as jr
      >>> async def train(client, data, objective):
      ...     step = await jr.client.forward_backward_custom_async(client, data, objective)
      ...     client.optim_step(jr.client.AdamParams())
      ...     return await step
      >>> data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 3, 4]})]
      >>> client = jr.client.EmbeddedTrainingClient(vocabulary=16)
      >>> result = asyncio.run(train(client, data, jr.losses.CrossEntropy()))
      >>> bool(result.output.base_loss.value > 0)
      True
    """
    composed = as_objective(objective, regularizers, track_grad_norms)
    ask = Ask(client, data, composed, logprobs=logprobs, state=state, key=key, step=step_of(client, step))
    ask = ask._replace(totals_of=totals_of)
    options = Options(top_k, timeout, max_drift, on_drift, requests)
    return await take_step(ask, options, asyncio.to_thread, arrival)


def _would_block_a_loop() -> bool:
    """But for a notebook, which always has a running loop, and whose cells may block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ not in ("ZMQInteractiveShell", "Shell")
