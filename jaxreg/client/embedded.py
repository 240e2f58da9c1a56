"""A trainer in the same process, behind the calls of the remote API: no account, no server."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.base.types import Array, PyTree
from jaxreg.batch.buckets import coarse_rows
from jaxreg.batch.packing import pad
from jaxreg.client import wire
from jaxreg.client.futures import ClientFuture
from jaxreg.client.types import ForwardBackwardOutput

_SHORTEST = 16
SCHEME = "embedded://"


@dataclasses.dataclass(frozen=True)
class OptimStepResponse:
    """The answer to an optimizer step; ``metrics["grad_norm"]`` is the norm before clipping."""

    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StateResponse:
    """The answer to saving or loading a state: its path."""

    path: str


class EmbeddedTrainingClient:
    """A real trainer behind the calls of Tinker's ``TrainingClient``.

    Requests run one after the other, in the order in which they are issued, in a thread of their own;
    every call gives a future at once. The loss is the API's linear cross-entropy, ``Σ −weight·logprob``,
    summed over tokens and datums; gradients add up until ``optim_step``. It does not sample.

    Args:
      apply_fn: the model, ``apply_fn(params, tokens [B, T]) -> logits [B, T, V]``, causal; by default a
        small Flax transformer with random weights.
      params: its parameters; needed with ``apply_fn``.
      optimizer: any optax optimizer. By default AdamW with what each ``optim_step`` is given.
      vocabulary: of the default model.
      seed: of the default model's weights.

    Example:
      >>> import jaxreg as jr
      >>> with jr.client.EmbeddedTrainingClient(vocabulary=16) as client:
      ...     datum = jr.client.Datum([1, 2], {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
      ...     reply = client.forward_backward([datum], "cross_entropy").result()
      ...     _ = client.optim_step(jr.client.AdamParams(learning_rate=1e-2)).result()
      >>> reply.loss_fn_outputs[0]["logprobs"].shape
      (2,)
    """

    def __init__(
        self,
        apply_fn: Callable[[PyTree, Array], Array] | None = None,
        params: PyTree = None,
        *,
        optimizer: optax.GradientTransformation | None = None,
        vocabulary: int = 256,
        seed: int = 0,
    ) -> None:
        if (apply_fn is None) != (params is None):
            raise ValueError("EmbeddedTrainingClient: give apply_fn and params together, or neither")
        if apply_fn is None:
            from jaxreg.client.language_model import small_model  # Flax's modules, where they are wanted

            apply_fn, params = small_model(vocabulary, seed)
        apply = apply_fn
        self._params = jax.tree.map(jnp.asarray, params)
        self._optimizer = optimizer or optax.inject_hyperparams(optax.adamw)(
            learning_rate=0.0, b1=0.9, b2=0.95, eps=1e-12, weight_decay=0.0
        )
        self._own_optimizer = optimizer is not None
        self._moments = self._optimizer.init(self._params)
        self._gradient: PyTree = None
        self._saved: dict[str, tuple[PyTree, PyTree]] = {}
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="jaxreg-trainer")

        def loss(params: PyTree, tokens: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
            logprobs = jax.nn.log_softmax(apply(params, tokens).astype(jnp.float32))
            columns = targets if targets.ndim == 3 else targets[..., None]
            picked = jnp.take_along_axis(logprobs, columns, axis=-1).reshape(targets.shape)
            return -jnp.sum(weights * picked), picked

        self._forward = jax.jit(lambda *args: loss(*args)[1])
        self._backward = jax.jit(jax.grad(loss, has_aux=True))
        shape = jax.eval_shape(apply, self._params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
        self._vocabulary = shape.shape[-1]

    @property
    def params(self) -> PyTree:
        """The model's parameters as they are once all requests so far are done."""
        return self._worker.submit(lambda: self._params).result()

    def forward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Any = None
    ) -> ClientFuture[ForwardBackwardOutput]:
        """The logprobs of every datum's targets, ``reply.loss_fn_outputs[i]["logprobs"]``; nothing trains.

        As in the API the data needs ``weights``, of any size, also where only logprobs are wanted.
        """
        return self._enqueue(self._run, list(data), loss_fn, False)

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Any = None
    ) -> ClientFuture[ForwardBackwardOutput]:
        """The logprobs, and the gradient of the weighted cross-entropy added to what is there."""
        return self._enqueue(self._run, list(data), loss_fn, True)

    def optim_step(self, adam_params: Any = None) -> ClientFuture[OptimStepResponse]:
        """Apply the gradients that added up, and begin anew.

        Args:
          adam_params: an object with the fields of `AdamParams`, such as the SDK's own; not looked at
            where the client was made with an optimizer of its own.
        """
        return self._enqueue(self._step, adam_params)

    def save_state(self, name: str, *, overwrite: bool = False, **_: Any) -> ClientFuture[StateResponse]:
        """Keep weights and optimizer state in memory, under a name."""
        return self._enqueue(self._save, name, overwrite)

    def load_state(self, path: str) -> ClientFuture[StateResponse]:
        """Load a saved state's weights; the optimizer begins anew."""
        return self._enqueue(self._load, path, "weights")

    def load_state_with_optimizer(self, path: str) -> ClientFuture[StateResponse]:
        """Load a saved state's weights and optimizer state."""
        return self._enqueue(self._load, path, "all")

    def close(self) -> None:
        """Finish what was asked for, and end the thread."""
        self._worker.shutdown()

    def __enter__(self) -> EmbeddedTrainingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue(self, work: Callable[..., Any], *arguments: Any) -> ClientFuture[Any]:
        return ClientFuture(self._worker.submit(work, *arguments))

    def _run(self, data: list[Any], loss_fn: str, backward: bool) -> ForwardBackwardOutput:
        if loss_fn != "cross_entropy":
            raise ValueError(f"the embedded trainer has one loss, 'cross_entropy'; got {loss_fn!r}")
        rows = wire.read(data)
        tokens = [
            _tokens(datum, row, i, self._vocabulary)
            for i, (datum, row) in enumerate(zip(data, rows, strict=True))
        ]
        targets = [row[wire.TARGETS].astype(np.int32) for row in rows]
        weights = [_weights(row, i) for i, row in enumerate(rows)]
        shape = coarse_rows(len(data)), max(_SHORTEST, 1 << (max(map(len, tokens)) - 1).bit_length())
        batch = pad(tokens, *shape), pad(targets, *shape), pad(weights, *shape)
        if backward:
            gradient, picked = self._backward(self._params, *batch)
            add = functools.partial(jax.tree.map, jnp.add)
            self._gradient = gradient if self._gradient is None else add(self._gradient, gradient)
        else:
            picked = self._forward(self._params, *batch)
        host = np.asarray(picked)
        loss = float(-np.sum(host * batch[2]))
        outputs = [{"logprobs": host[i, : len(t)]} for i, t in enumerate(tokens)]
        return ForwardBackwardOutput("embedded", outputs, {"loss:sum": loss})

    def _step(self, settings: Any) -> OptimStepResponse:
        gradient = jax.tree.map(jnp.zeros_like, self._params) if self._gradient is None else self._gradient
        norm = optax.tree.norm(gradient)
        if not self._own_optimizer:
            if settings is None:
                raise ValueError("optim_step needs settings, AdamParams(learning_rate=...)")
            limit = float(getattr(settings, "grad_clip_norm", 0.0) or 0.0)
            if limit:
                gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / (norm + 1e-6)), gradient)
            self._moments.hyperparams.update(
                learning_rate=jnp.asarray(settings.learning_rate),
                b1=jnp.asarray(settings.beta1),
                b2=jnp.asarray(settings.beta2),
                eps=jnp.asarray(settings.eps),
                weight_decay=jnp.asarray(settings.weight_decay),
            )
        updates, self._moments = self._optimizer.update(gradient, self._moments, self._params)
        self._params = optax.apply_updates(self._params, updates)
        self._gradient = None
        return OptimStepResponse({"grad_norm": float(norm)})

    def _save(self, name: str, overwrite: bool) -> StateResponse:
        if not overwrite and SCHEME + name in self._saved:
            raise ValueError(f"a state {name!r} is saved already; say overwrite=True")
        self._saved[SCHEME + name] = jax.tree.map(lambda leaf: leaf, (self._params, self._moments))
        return StateResponse(SCHEME + name)

    def _load(self, path: str, what: Literal["weights", "all"]) -> StateResponse:
        if path not in self._saved:
            raise KeyError(f"no state was saved as {path!r}; there are {sorted(self._saved)}")
        params, moments = self._saved[path]
        self._params = params
        kept = jax.tree.map(lambda leaf: leaf, moments)
        self._moments = kept if what == "all" else self._optimizer.init(params)
        self._gradient = None
        return StateResponse(path)


def _tokens(datum: Any, row: dict[str, Any], i: int, vocabulary: int) -> np.ndarray:
    tokens, targets = wire.tokens_of(datum, i), row[wire.TARGETS]
    if len(tokens) != len(targets):
        raise ValueError(
            f"datum {i}: model_input has shape {tokens.shape}, and {wire.TARGETS!r} {targets.shape}: one "
            f"token in for every token out"
        )
    for name, ids in (("model_input", tokens), (wire.TARGETS, targets)):
        if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise ValueError(
                f"datum {i}: {name} holds tokens outside of the vocabulary, 0 … {vocabulary - 1}"
            )
    return tokens.astype(np.int32)


def _weights(row: dict[str, Any], i: int) -> np.ndarray:
    if wire.WEIGHTS not in row:
        raise ValueError(f"datum {i}: the cross-entropy needs {wire.WEIGHTS!r}, one a target token")
    return wire.own_weights(row).astype(np.float32)
