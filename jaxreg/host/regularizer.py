"""What a host term is: everything about it is checked when it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any, Literal, cast

from jaxreg.base.types import ArrayLike, Place, Schedule
from jaxreg.core.spec import (
    RESERVED_METRICS,
    Additive,
    RegularizerSpec,
    check_additive,
    check_name,
    check_weight,
)
from jaxreg.host.callback import HostTerm
from jaxreg.host.result import OWN
from jaxreg.host.runtime import RUNNERS, Runtime

_MAKING = threading.Lock()
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True, eq=False)
class HostRegularizer:
    """A named, weighted term that is no array program: a query over HTTP, a solver, a judge.

    It goes to `compose` like any other term, with a weight that ``with_weights`` and ``without`` change.
    With a remote model (`jaxreg.client`) it runs beside the compiled pass: all host terms of a step run at
    once; one that takes the data alone starts while the remote forward is under way, one that takes the
    logprobs when they are there. In a jitted loop of your own it runs in a callback, when XLA gets there; on
    the CPU, one callback after the other.

    Args:
      name: as in `RegularizerSpec`.
      fn: ``fn(data)`` or ``fn(data, logprobs)``. It returns ``value``, ``(value, {metric: number})`` or
        ``(value, metrics, gradient)``, where the gradient is d(value)/d(logprobs), one array a datum of the
        logprobs' shape: a score-function estimate, or that of a surrogate. Without one the term adds to the
        loss and moves nothing; its metric ``host_trains`` is then 0.
        Remote: ``data`` are the API's datums, ``logprobs`` one array [T] or [T, K] a datum. In a jitted
        loop: ``data`` is one `Row` a datum of a `TokenBatch`, else the batch, and ``logprobs`` what is
        differentiated.
      weight: as in `RegularizerSpec`.
      run: ``"coroutine"`` (the default for an ``async def``: an event loop of the term's own, the same in
        every step, so that a session opened in it stays good), ``"thread"`` (the default for any other:
        for functions that block), or ``"process"`` (for those that compute: fn and data are pickled, and a
        script keeps what it runs under ``if __name__ == "__main__":``). A fresh process imports jaxreg
        first; it is kept for the next step.
      timeout: seconds that a call may take; None waits for ever. A coroutine is then cancelled, a process
        killed; a thread cannot be stopped, and keeps its place among ``max_concurrency`` until it ends.
      max_concurrency: how many calls may run at once (of steps that overlap, or that were abandoned).
      on_error: what a failure does: ``"raise"`` `HostTermError`, ``"skip"`` the term (value 0, metric
        ``host_age`` −1), or count its ``"last"`` good value, without a gradient, and ``host_age`` steps
        old; before there is one, it is skipped.
      metrics: the names of the metrics that a jitted loop reports; it must know them beforehand.
      on, additive: as in `RegularizerSpec`.

    Every step reports the metrics ``host_seconds``, ``host_age`` and ``host_trains`` beside its own.
    ``close()``, or leaving a ``with`` block, ends its threads and processes; so does dropping the term.

    Raises:
      TypeError, ValueError: naming the term, when any of these is not so.

    Example:
      >>> import numpy as np, jaxreg as jr
      >>> async def banned(data, logprobs):  # imagine an HTTP request
      ...     hits = [np.asarray(datum.loss_fn_inputs["target_tokens"]) == 13 for datum in data]
      ...     value = sum(float(np.exp(lp)[hit].sum()) for lp, hit in zip(logprobs, hits))
      ...     return value, {"hits": sum(map(np.sum, hits))}, [
      ...         np.where(hit, np.exp(lp), 0.0) for lp, hit in zip(logprobs, hits)]
      >>> term = jr.host.HostRegularizer("banned", banned, weight=2.0, timeout=5.0, on_error="last")
      >>> objective = jr.compose(jr.losses.CrossEntropy(), [term], track_grad_norms=True)
      >>> client = jr.client.EmbeddedTrainingClient(vocabulary=16)
      >>> data = [jr.client.Datum([1, 2, 3], {"target_tokens": [2, 13, 4]})]
      >>> out = jr.client.forward_backward_custom(client, data, objective).result().output
      >>> out.regularizers["banned"].custom["hits"].item(), out.regularizers["banned"].grad_norm.item() > 0
      (1.0, True)
      >>> term.close()
    """

    name: str
    fn: Callable[..., Any]
    weight: ArrayLike | Schedule
    run: Literal["coroutine", "thread", "process"] | None = None
    timeout: float | None = 60.0
    max_concurrency: int = 4
    on_error: Literal["raise", "skip", "last"] = "raise"
    metrics: tuple[str, ...] = ()
    on: Place = "outputs"
    additive: Additive | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        who = f"host term {self.name!r}"
        if not callable(self.fn) or inspect.isclass(self.fn):
            raise TypeError(f"{who}: fn is a function of (data) or (data, logprobs), got {self.fn!r}")
        if not callable(self.weight):
            check_weight(self.weight, self.name)
        check_additive(self.additive, who)
        self._check_run(who)
        number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if self.timeout is not None and not (number and 0 < self.timeout < float("inf")):
            raise ValueError(f"{who}: timeout is a number of seconds > 0, or None, got {self.timeout!r}")
        if type(self.max_concurrency) is not int or self.max_concurrency < 1:
            raise ValueError(f"{who}: max_concurrency is a whole number ≥ 1, got {self.max_concurrency!r}")
        if self.on_error not in ("raise", "skip", "last"):
            raise ValueError(f"{who}: on_error is 'raise', 'skip' or 'last', got {self.on_error!r}")
        if isinstance(cast(Any, self.metrics), str) or not all(
            isinstance(m, str) and m for m in self.metrics
        ):
            raise TypeError(f"{who}: metrics is a sequence of names, got {self.metrics!r}")
        if bad := [m for m in self.metrics if m in RESERVED_METRICS or m.startswith(OWN)]:
            raise ValueError(f"{who}: the metrics {bad} would collide with jaxreg's own; rename them")
        object.__setattr__(self, "metrics", tuple(self.metrics))
        _ = self.takes_logprobs  # complains early

    def _check_run(self, who: str) -> None:
        is_async = _is_async(self.fn)
        run = self.run or ("coroutine" if is_async else "thread")
        if run not in RUNNERS:
            raise ValueError(f"{who}: run is 'coroutine', 'thread' or 'process', got {run!r}")
        if (run == "coroutine") != is_async:
            kind = "an `async def`" if is_async else "no `async def`"
            raise ValueError(f"{who}: run={run!r}, but fn is {kind}; leave run= out, or change fn")
        if run == "process":
            try:
                pickle.loads(pickle.dumps(self.fn))
            except Exception as error:
                raise TypeError(
                    f"{who}: fn cannot be pickled, so no other process can run it ({error}); define it at "
                    f"the top level of a module, with functools.partial for its arguments"
                ) from error
        object.__setattr__(self, "run", run)

    @functools.cached_property
    def takes_logprobs(self) -> bool:
        """Whether fn takes ``(data, logprobs)``, and so waits for them, or ``(data)`` alone."""
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):
            return True  # a builtin without a signature
        positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
        # fn(data, limit=3) takes the data alone, fn(data, logprobs=None) and fn(*arguments) both.
        second = positional[1] if len(positional) > 1 else None
        optional = second is not None and second.default is not second.empty and second.name != "logprobs"
        for arguments in (1,) if optional else (2, 1):
            with contextlib.suppress(TypeError):
                signature.bind(*[object()] * arguments)
                return arguments == 2
        raise TypeError(
            f"host term {self.name!r}: fn is called as fn(data) or fn(data, logprobs); its signature "
            f"{signature} does not fit. Bind other arguments first, with functools.partial"
        )

    def as_spec(self) -> RegularizerSpec:
        """The term as `compose` takes it: a callback, when it is compiled."""
        return RegularizerSpec(
            name=self.name, fn=HostTerm(self), weight=self.weight, on=self.on, additive=self.additive
        )

    def close(self) -> None:
        """Cancel its calls and end its threads and processes. Used again, it starts afresh."""
        if runtime := self.__dict__.pop("runtime", None):
            runtime.close()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the term, without its threads and processes."""
        return {key: value for key, value in vars(self).items() if key not in ("runtime", "compositions")}

    def __enter__(self) -> HostRegularizer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def compositions(self) -> dict[Any, Any]:
        """Objectives that the remote client composed with this term; they go when it goes."""
        return {}

    @functools.cached_property
    def runtime(self) -> Runtime:
        """What is remembered between steps."""
        with _MAKING:
            made: Runtime | None = self.__dict__.get("runtime")
            return made or Runtime(self, str(self.run), self.fn, self.name, self.max_concurrency)


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004
