"""One evaluation of an objective for a remote model: what is compiled, and what runs beside it."""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreg.base.events import emit, listening
from jaxreg.base.types import Array, PyTree
from jaxreg.batch.token_batch import TokenBatch
from jaxreg.client.errors import NonFiniteGradient
from jaxreg.client.local import Linearized, check_groups, dry_run, linearize
from jaxreg.client.wire import first_nonfinite
from jaxreg.core.objective import CompositeLoss
from jaxreg.core.output import CustomLossOutput, RegularizerOutput
from jaxreg.events.log import Inputs, log
from jaxreg.host.calls import HostCalls, HostResult
from jaxreg.host.part import part
from jaxreg.host.regularizer import HostRegularizer
from jaxreg.host.rows import masked


class Evaluation:
    """`begin`, then `at` some logprobs, then `stop` or `fail`.

    Args:
      objective: all of it, host terms too.
      data: the caller's datums, for the host terms.
      batch: the same, packed.
      like: the targets, whose shapes are the logprobs'.
      state, key, step: of this step.
    """

    def __init__(
        self,
        objective: CompositeLoss,
        data: Sequence[Any],
        batch: TokenBatch,
        like: Sequence[np.ndarray],
        state: PyTree,
        key: Array | None,
        step: int | None,
    ) -> None:
        self._names = objective.names
        self._compiled, host = part(objective)
        self._data, self._batch, self._state, self._key, self._step = data, batch, state, key, step
        self._weights = _weights(objective, host, state)
        self._calls = HostCalls(host, list(like), step)
        self._inputs: Inputs | None = None
        self._output: CustomLossOutput
        self._times: dict[str, float] = {}
        self._began = time.perf_counter()
        self._over = threading.Lock()  # taken by whoever tells the end of it, once
        check_groups(self._compiled, batch, len(data))
        dry_run(self._compiled, batch, like, state, key)

    def begin(self) -> None:
        """Tell that the step begins, and start the host terms that read the data alone."""
        self._began = time.perf_counter()
        if listening():
            tokens = int(np.sum(self._batch.lengths))
            about = {"terms": self._names, "datums": len(self._data), "tokens": tokens}
            emit("custom_loss.start", step=self._step, metadata=about)
        try:
            self._calls.start(self._data)
        except BaseException as error:
            self.fail(error)
            raise

    def at(self, logprobs: Sequence[np.ndarray]) -> Linearized:
        """The objective and its gradient; the host terms that read logprobs run meanwhile."""
        arrived = time.perf_counter()
        self._calls.start(self._data, [_read_only(values) for values in logprobs])
        if listening():
            self._inputs = Inputs(self._compiled, list(logprobs), self._batch, self._state, self._key)
        done = linearize(self._compiled, self._batch, logprobs, self._state, self._key)
        computed = time.perf_counter()
        if self._calls.terms:
            try:
                results = self._calls.collect()
            except Exception as error:
                error.add_note("No gradient was sent: the remote model is as it was.")
                raise
            masks = self._batch.unpack(self._batch.mask)
            done = _joined(done, results, self._weights, self._names, masks)
        self._times = {
            "forward": arrived - self._began,
            "objective": computed - arrived,
            "host": time.perf_counter() - computed,
        }
        self._output = done.output
        return done

    def stop(self) -> None:
        """Tell how it went."""
        if self._over.acquire(blocking=False) and listening():
            times = {"duration": time.perf_counter() - self._began, **self._times}
            log(self._output, step=self._step, inputs=self._inputs, measurements=times)

    def cancel(self) -> None:
        """Cancel the host terms."""
        self._calls.cancel()

    def fail(self, error: BaseException) -> None:
        """Cancel the host terms, and tell what went wrong."""
        self.cancel()
        if self._over.acquire(blocking=False):
            self._calls.tell_the_rest()
            emit(
                "custom_loss.exception",
                step=self._step,
                measurements={"duration": time.perf_counter() - self._began},
                metadata={"error": error, "inputs": self._inputs},
            )


def _weights(
    objective: CompositeLoss, host: Sequence[HostRegularizer], state: PyTree
) -> dict[str, np.float32]:
    constants = objective.constants
    if any(callable(term.weight) for term in host):
        constants = objective.weights(state)
    return {term.name: np.float32(constants[term.name]) for term in host}


def _joined(
    done: Linearized,
    results: Mapping[str, HostResult],
    weights: Mapping[str, np.float32],
    names: Sequence[str],
    masks: Sequence[np.ndarray],
) -> Linearized:
    """The compiled terms' output and gradient with the host terms' added.

    Raises:
      NonFiniteGradient: a weight makes a host term's gradient so, or the sum overflows.
    """
    output, gradients = done.output, [np.array(gradient) for gradient in done.gradients]
    tracked = output.total_grad_norm is not None
    per_datum = output.base_loss.grad_norm_per_datum
    terms = dict(output.regularizers)
    added = 0.0
    for name, result in results.items():
        weight = weights[name]
        slopes = [masked(slope, mask) for slope, mask in zip(result.gradient or (), masks, strict=False)]
        terms[name] = _report(name, weight, result, slopes, tracked, per_datum)
        added += float(terms[name].contribution)
        with np.errstate(over="ignore", invalid="ignore"):
            for i, slope in enumerate(slopes):
                gradients[i] += weight * slope
        if slopes and (found := first_nonfinite(gradients)):
            i, at, number = found
            raise NonFiniteGradient(
                f"d(loss)/d(logprobs) of datum {i} at {at} is {number}; it comes from term {name!r} at its "
                f"weight of {weight:g}, or from the sum with the terms before it",
                terms=(name,),
                datum=i,
            )
    output = output.replace(  # type: ignore[attr-defined]
        loss_total=np.float32(float(output.loss_total) + added),
        regularizers=type(output.regularizers)((name, terms[name]) for name in names),
        regularizer_total=np.float32(float(output.regularizer_total) + added),
        total_grad_norm=np.float32(_norm(gradients)) if tracked else None,
    )
    return Linearized(output, gradients)


def _report(
    name: str,
    weight: np.float32,
    result: HostResult,
    gradient: Sequence[np.ndarray],
    tracked: bool,
    per_datum: Any,
) -> RegularizerOutput:
    length = np.float32(_norm(gradient)) if tracked else None
    by_datum = None
    if tracked and per_datum is not None:
        by_datum = np.zeros(np.shape(per_datum), np.float32)
        by_datum[: len(gradient)] = [_norm([slope]) for slope in gradient]
    fields: dict[str, Any] = {
        "value": np.float32(result.value),
        "weight": weight,
        "contribution": weight * np.float32(result.value),
        "grad_norm": length,
        "grad_norm_weighted": None if length is None else weight * length,
        "custom": {key: np.float32(number) for key, number in result.metrics.items()},
        "grad_norm_per_datum": by_datum,
    }
    return RegularizerOutput(name=name, **fields)


def _norm(gradient: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in gradient)))


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view for host functions, which must not edit what the compiled pass reads meanwhile."""
    view = array.view()
    view.flags.writeable = False
    return view


@contextlib.contextmanager
def telling_of_failure(step: int | None) -> Iterator[None]:
    """What fails before a step has begun (its data, a cancellation) is told, too."""
    try:
        yield
    except BaseException as error:
        emit("custom_loss.exception", step=step, metadata={"error": error, "inputs": None})
        raise


_STEPS: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


def step_of(client: Any, step: int | None) -> int | None:
    """The step that the caller names, or how many this client has taken; None where it cannot be counted."""
    if step is not None:
        return operator.index(step)
    try:
        return next(_STEPS.setdefault(client, itertools.count()))
    except TypeError:  # neither hashed nor weakly referenced
        return None
