"""Case "client": what a remote step costs here, between the forward's reply and the backward's request.

64 ragged datums of 200 to 1,024 tokens, six terms, norms tracked: receive, pack, evaluate, differentiate,
unpack, and build the datums that go out.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxreg as jr
from benchmarks.measure.answers import Answer

ROWS, SHORTEST, LONGEST = 64, 200, 1024
WEIGHTS = {"l1": 0.01, "entropy": 0.05, "kl": 0.1, "log_ratio": 0.03, "ppo": 0.5}
KEYS = ("target_tokens", "weights", "ref_logprobs", "logprobs", "advantages")


class Tensor:
    """An SDK's tensor, as far as both sides read it: an array, its list, its shape."""

    def __init__(self, array: np.ndarray) -> None:
        self._numpy = array
        self.shape = list(array.shape)

    @property
    def data(self) -> list[float]:
        return self._numpy.flatten().tolist()

    def to_numpy(self) -> np.ndarray:
        return self._numpy


def draw() -> dict[str, np.ndarray]:
    """Padded arrays [64, 1024] by name, and lengths [64]."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, ROWS)
    shape = (ROWS, LONGEST)
    lp = -rng.uniform(0.05, 5, shape)
    arrays = {
        "lp": lp,
        "target_tokens": rng.integers(0, 1000, shape),
        "weights": (rng.random(shape) < 0.9).astype(float),
        "ref_logprobs": np.minimum(lp + 0.3 * rng.normal(size=shape), 0),
        "logprobs": np.minimum(lp + 0.3 * rng.normal(size=shape), 0),
        "advantages": rng.normal(size=shape),
    }
    floats = {k: v.astype(np.float32) if v.dtype == float else v for k, v in arrays.items()}
    return floats | {"lengths": lengths}


def datums(arrays: dict[str, np.ndarray]) -> list[Any]:
    """The data as an SDK has it."""
    return [
        jr.client.Datum([0] * n, {key: Tensor(arrays[key][i, :n]) for key in KEYS})
        for i, n in enumerate(arrays["lengths"])
    ]


def reply(arrays: dict[str, np.ndarray]) -> Any:
    """The server's answer to the forward request."""
    outputs = [{"logprobs": Tensor(arrays["lp"][i, :n])} for i, n in enumerate(arrays["lengths"])]
    return types.SimpleNamespace(loss_fn_outputs=outputs, metrics={})


def objective() -> jr.CompositeLoss:
    """The six terms, all token means."""
    terms: dict[str, Callable[..., Any]] = {
        "l1": jr.regularizers.L1(reduction="token_mean"),
        "entropy": jr.regularizers.Entropy(mode="maximize", gradient="pathwise"),  # as PyTorch has it
        "kl": jr.regularizers.KL(),
        "log_ratio": jr.regularizers.LogRatioL2(),
        "ppo": jr.losses.PPO(reduction="token_mean"),
    }
    specs = [jr.RegularizerSpec(name=n, fn=fn, weight=WEIGHTS[n]) for n, fn in terms.items()]
    return jr.compose(jr.losses.CrossEntropy(reduction="token_mean"), specs, track_grad_norms=True)


class Step:
    """One step against a server that answers at once; keeps what was sent."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._data, self._reply, self._objective = datums(arrays), reply(arrays), objective()
        self.sent: list[Any] = []
        self.output: Any = None

    def forward(self, data: Any, loss_fn: str) -> Any:
        return self._reply

    def forward_backward(self, data: Any, loss_fn: str) -> Any:
        self.sent = data
        return self._reply

    def __call__(self) -> None:
        future = jr.client.forward_backward_custom(self, self._data, self._objective)
        self.output = future.output

    def answer(self) -> Answer:
        """The gradient, every value and every norm."""
        self()
        weights = [datum.loss_fn_inputs["weights"] for datum in self.sent]
        out = self.output
        terms = {"base": out.base_loss, **out.regularizers}
        return (
            {"gradient": -np.concatenate(weights)}
            | {f"value/{name}": np.asarray(term.value) for name, term in terms.items()}
            | {f"norm/{name}": np.asarray(term.grad_norm) for name, term in terms.items()}
        )
