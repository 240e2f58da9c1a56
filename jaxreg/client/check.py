"""Is a server linear in the weights that it is sent? Everything here stands on that, so it is measured."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxreg.client import wire
from jaxreg.client.errors import Applied, RemoteError, Step
from jaxreg.client.requests import LOSS, submit, wait
from jaxreg.client.types import AdamParams, Datum

# Where epsilon is far above every gradient an Adam step is learning_rate/epsilon · gradient.
EPSILON = 1e9
MOVE = 0.05  # nats that the reference step is to move the logprobs by, at most: far above rounding
SMALL, LARGE = 1e-7, 1e3  # a token mean over a large batch has gradients of 1e-7, a sum over it of 1e3
NOISIEST = 0.1  # A tolerance above it would not tell one server from another.

Request = Sequence[tuple[int, np.ndarray]]  # which probe datum, with which weights
WHAT = {
    "repeated": "the same step twice moves the model alike",
    "direction": "a positive weight makes its tokens likelier",
    "doubled": "twice the weights at half the learning rate are the same step",
    "small": f"weights of {SMALL:g} at {1 / SMALL:g} times the learning rate are, too",
    "large": f"and weights of {LARGE:g} at {1 / LARGE:g} times",
    "token by token": "two sets of weights for one datum add up, of either sign, and of sum 0",
    "shifted between datums": "weight that is moved from one datum to another adds up",
    "zero-sum": "weights that cancel do not move the model",
    "two requests": "one datum a request, accumulated, is both datums in one",
    "negative request": "a request whose weights are all negative takes back as much as it should",
    "zero-sum request": "a request whose weights sum to 0 counts as any other",
    "idle datum": "a datum without any weight changes nothing",
    "evenly": "every token of every datum counts by its own weight, and by nothing else",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One property: how far from linear the server is, relative to the reference step."""

    name: str
    ok: bool
    error: float
    meaning: str


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """What `check_backend` found.

    Attributes:
      ok: whether the server is linear in the weights, so that composed objectives train as written.
      checks: every property by name, with its relative error.
      tolerance: what an error may be: the one asked for, or three times the server's own noise.
      moved: by how much the reference step moved the logprobs, in nats.
      diagnosis: what the server does instead, and what that means for an objective.
      requests: how many requests it took.
      not_undone: what stays changed on the server.
    """

    ok: bool
    checks: dict[str, Check]
    tolerance: float
    moved: float
    diagnosis: str
    requests: int
    not_undone: str

    def __str__(self) -> str:
        lines = [f"{'linear' if self.ok else 'NOT LINEAR'} in the weights it is sent: {self.diagnosis}"]
        lines += [
            f"  {'ok ' if c.ok else 'BAD'} {c.name:<23} off by {c.error:8.2g}   ({c.meaning})"
            for c in self.checks.values()
        ]
        lines.append(f"  within {self.tolerance:.2g}; {self.requests} requests. {self.not_undone}")
        return "\n".join(lines)


def check_backend(
    client: Any,
    data: Sequence[Any] | None = None,
    *,
    adam_params: Callable[..., Any] | None = None,
    tolerance: float = 0.02,
    timeout: float | None = None,
    seed: int = 0,
) -> BackendReport:
    """Measure whether a server is linear in the weights that it is sent.

    A composed objective's gradient goes out as the weights of a linear cross-entropy. A server that
    divides each sequence by the sum of its weights, averages over datums, or clips, turns it into
    something else without any error. Here the same small step is taken along ways that are equal on a
    linear server, and the logprobs that result are compared. Needs public calls only: ``forward``,
    ``forward_backward``, ``optim_step``, ``save_state``, ``load_state`` and ``load_state_with_optimizer``.
    An Adam step with a large epsilon is proportional to the gradient, so no gradient norm needs to be
    reported; and as gradients are compared through equal steps, no curvature gets in the way.

    The model's weights and the optimizer are saved first and loaded again at the end, also after a failure.

    Args:
      client: a training client, as for `forward_backward_custom`.
      data: two datums or more (the first two are used), of 4 tokens or more; made up by default, of token
        ids below 64.
      adam_params: the type of the optimizer's settings, called with ``learning_rate=``, ``beta1=``,
        ``beta2=``, ``eps=`` and ``weight_decay=``. By default Tinker's own for a client of its SDK, and
        `AdamParams` for others.
      tolerance: by how much, relative to the reference step, a result may be off. Where the server does
        not repeat itself that well, three times its own noise counts instead.
      timeout: seconds to wait for each reply.
      seed: of the weights that are sent.

    Returns:
      A `BackendReport`; print it.

    Raises:
      RemoteError: a request failed.

    Example:
      >>> import jaxreg as jr
      >>> with jr.client.EmbeddedTrainingClient(vocabulary=64) as client:
      ...     report = jr.client.check_backend(client)
      >>> report.ok
      True
    """
    for name in (
        "forward", "forward_backward", "optim_step", "save_state", "load_state", "load_state_with_optimizer",
    ):  # fmt: skip
        if not callable(getattr(client, name, None)):
            raise TypeError(f"check_backend: {type(client).__name__} has no {name}()")
    probe = _Probe(client, _probes(client, data), adam_params or _settings_of(client), timeout)
    probe.save()
    try:
        probe.begin()
        report = _measure(probe, tolerance, np.random.default_rng(seed))
    except Exception as error:
        try:
            probe.restore()
        except RemoteError as second:
            error.add_note(
                f"The model was not restored, either: {second}. Its state is saved as {probe.path!r}."
            )
        raise
    probe.restore()
    return report


def _measure(probe: _Probe, tolerance: float, rng: np.random.Generator) -> BackendReport:
    a, b = (rng.uniform(0.5, 1.5, shape).astype(np.float32) for shape in probe.shapes)
    mixed, other = (rng.normal(size=shape).astype(np.float32) for shape in probe.shapes)
    mixed, other = mixed - mixed.mean(), other - other.mean()  # of both signs, and of sum 0
    both: Request = [(0, a), (1, b)]
    rest: Request = [(0, a - mixed), (1, b - other)]
    scale, reference = probe.calibrate([both])
    size = float(np.linalg.norm(reference))

    def error(steps: Sequence[Request], scaled: float = 1.0, expected: np.ndarray = reference) -> float:
        gap = float(np.linalg.norm(probe.step(steps, scale * scaled) - expected)) / size
        return gap if np.isfinite(gap) else float("inf")

    def times(factor: float) -> Request:
        return [(i, np.float32(factor) * weights) for i, weights in both]

    noise = error([both])
    in_pieces = probe.step([[(0, 2 * a)], [(1, 0.5 * b)]], scale)
    towards = float(np.vdot(_flat(both), reference))
    errors = {
        "repeated": noise,
        "direction": 0.0 if towards > 0 else 2.0,
        "doubled": error([times(2)], 0.5),
        "small": error([times(SMALL)], 1 / SMALL),
        "large": error([times(LARGE)], 1 / LARGE),
        "token by token": error([[*rest, (0, mixed), (1, other)]]),
        "shifted between datums": error([[(0, 2 * a), (1, 0.5 * b)]], expected=in_pieces),
        "zero-sum": error([[*both, *times(-1)]], expected=np.zeros_like(reference)),
        "two requests": error([both[:1], both[1:]]),
        "negative request": error([times(-1), times(2)]),
        "zero-sum request": error([rest, [(0, mixed), (1, other)]]),
        "idle datum": error([[*both, (0, np.zeros_like(a))]]),
        "evenly": _asymmetry(probe, scale, both, reference, rng),
    }
    allowed = min(max(tolerance, 3 * noise), NOISIEST)
    checks = {n: Check(n, e <= allowed, e, WHAT[n]) for n, e in errors.items()}
    ok = all(check.ok for check in checks.values())
    diagnosis = _diagnose(checks, probe, scale, reference, both)
    return BackendReport(
        ok, checks, allowed, float(np.abs(reference).max()), diagnosis, probe.requests, probe.not_undone
    )


def _asymmetry(
    probe: _Probe, scale: float, both: Request, reference: np.ndarray, rng: np.random.Generator
) -> float:
    """How much more weights u move what v looks at than the other way round.

    A small gradient step moves the logprobs by K·u with one matrix K = J Jᵀ, which is symmetric: u·K·v is
    v·K·u. A server that applies K·D·u, with a factor of its own a token or a sequence, is not, unless D is
    the same for all.
    """
    lean: list[tuple[int, np.ndarray]] = []
    for i, shape in enumerate(probe.shapes):
        weights = rng.normal(size=shape).astype(np.float32)
        weights[[0, -1]] *= 4.0  # where an offset by one would show
        lean.append((i, weights * np.float32(3.0 if i else 1.0)))
    u, v = _flat(both), _flat(lean)
    by_u = 0.5 * (reference - probe.step([[(i, -w) for i, w in both]], scale))  # without the curvature
    by_v = 0.5 * (probe.step([lean], scale) - probe.step([[(i, -w) for i, w in lean]], scale))
    gap = abs(np.vdot(u, by_v) - np.vdot(v, by_u)) / np.sqrt(abs(np.vdot(u, by_u) * np.vdot(v, by_v)) + 1e-30)
    return float(gap) if np.isfinite(gap) else float("inf")


def _diagnose(
    checks: dict[str, Check], probe: _Probe, scale: float, reference: np.ndarray, both: Request
) -> str:
    bad = {name for name, check in checks.items() if not check.ok}
    if not bad:
        return "d(loss)/d(logprobs) arrives as it was sent, so composed objectives train as they are written."
    if "repeated" in bad:
        return (
            "the server does not repeat itself, so nothing can be told: the same step twice differs by "
            f"{checks['repeated'].error:.0%} of the step. (Does load_state begin with a fresh optimizer?)"
        )
    if "direction" in bad:
        return (
            "it climbs where it should descend: a positive weight makes its tokens less likely. Every "
            "objective would be trained backwards."
        )
    if "doubled" in bad:
        # A millionth of the weights at the same rate: next to nothing, where they come through
        # in proportion (below what is clipped), and the whole step where their size is divided away.
        tiny = probe.step([[(i, w / 1e6) for i, w in both]], scale)
        if np.vdot(tiny, reference) > 0.5 * np.vdot(reference, reference):
            if "two requests" not in bad and "idle datum" not in bad:
                where = "each sequence by the sum (or mean) of its weights"
            else:
                where = "each request by the sum of its weights"
            return (
                f"it divides {where}, or its optimizer divides by the gradient's size whatever its epsilon: "
                f"a gradient's size is lost, and where weights sum to nearly 0, as a zero-mean gradient's "
                f"do, the result is arbitrary. Regularizers' weights have no effect, and penalties on "
                f"differences go wrong. Do not use composed objectives with it."
            )
        return (
            "it clips or saturates what it is sent (small weights come through in proportion, larger ones "
            "do not): scale the loss down, or turn clipping off."
        )
    if "two requests" in bad or "idle datum" in bad:
        return (
            "it averages over the datums (or tokens) of each request: gradients keep their direction within "
            "a request, but their size depends on how many datums travel with them, and on how the SDK "
            "splits the batch. Keep requests of one size and multiply the loss by the number of datums."
        )
    if bad & {"zero-sum", "token by token", "negative request", "zero-sum request"}:
        return (
            "it loses weights' signs or drops some of them (negative ones, or requests that sum to nothing "
            "positive): only what raises logprobs gets through. Base losses on the data itself may train; "
            "penalties, KL terms and preference losses do not."
        )
    if "small" in bad:
        return (
            "it drops or rounds small weights, such as a mean over many tokens sends: multiply the loss by "
            "the number of tokens (reduction='token_sum'), and the learning rate the other way."
        )
    if "large" in bad:
        return "it clips large weights, such as a sum over many tokens sends: scale the loss down."
    if "evenly" in bad:
        return (
            "it is linear, but does not count tokens alike: it divides each sequence by its own number of "
            "tokens, or shifts or drops some. Weights arrive at the wrong tokens or with a factor that "
            "depends on a sequence's length."
        )
    return f"it is not linear in the weights: {', '.join(sorted(bad))} failed."


class _Probe:
    """Takes one step from the saved state and says how the logprobs moved."""

    def __init__(
        self, client: Any, data: list[Any], settings: Callable[..., Any], timeout: float | None
    ) -> None:
        self._client, self._data, self._settings, self._timeout = client, data, settings, timeout
        rows = wire.read(data)
        self._targets = [row[wire.TARGETS] for row in rows]
        self.shapes = [target.shape for target in self._targets]
        self.requests = 0
        self._path = ""
        self._name = f"jaxreg-check-{uuid.uuid4().hex[:12]}"

    @property
    def path(self) -> str:
        """Where the state from before is saved."""
        return self._path

    @property
    def not_undone(self) -> str:
        return (
            f"Not undone: gradients that waited for an optimizer step are gone, and the saved state "
            f"{self._path!r} remains."
        )

    def save(self) -> None:
        self._path = self._ask("save", "save_state", self._name, applied="no").path

    def begin(self) -> None:
        # Gradients that are waiting already would end up in the first step measured here.
        self._optimizer_step(0.0)
        self._ask("load", "load_state", self._path)
        self._before = self._logprobs()

    def restore(self) -> None:
        self._ask("load", "load_state_with_optimizer", self._path)

    def calibrate(self, requests: Sequence[Request]) -> tuple[float, np.ndarray]:
        """A learning rate over epsilon at which the step moves the logprobs by about `MOVE`."""
        scale = 1e-4
        for _ in range(8):
            moved = self.step(requests, scale)
            largest = float(np.abs(moved).max()) if np.isfinite(moved).all() else float("inf")
            if MOVE / 4 <= largest <= MOVE * 2:
                return scale, moved
            scale *= (
                0.01 if not np.isfinite(largest) else float(np.clip(MOVE / max(largest, 1e-12), 1e-3, 1e3))
            )
        raise RemoteError(
            f"a plain step of the cross-entropy moves the logprobs by {largest:.2g} nats whatever the "
            f"learning rate, so nothing can be measured: does optim_step take effect?",
            step="optim_step",
            gradient_applied="maybe",
        )

    def step(self, requests: Sequence[Request], scale: float) -> np.ndarray:
        self._ask("load", "load_state", self._path)
        for request in requests:
            data = [wire.with_weights(self._data[i], weights) for i, weights in request]
            self._ask("backward", "forward_backward", data, LOSS)
        self._optimizer_step(scale * EPSILON)
        return self._logprobs() - self._before

    def _optimizer_step(self, learning_rate: float) -> None:
        settings = self._settings(
            learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=EPSILON, weight_decay=0.0
        )
        self._ask("optim_step", "optim_step", settings)

    def _logprobs(self) -> np.ndarray:
        zeros = [np.zeros(target.shape, np.float32) for target in self._targets]
        data = [wire.with_weights(datum, weights) for datum, weights in zip(self._data, zeros, strict=True)]
        reply = self._ask("forward", "forward", data, LOSS)
        # NaN is an answer, too: some servers give it after weights that sum to 0.
        arrays = wire.logprobs_of(reply, self._targets, "forward", "maybe", finite=False)
        return np.concatenate([array.ravel() for array in arrays]).astype(np.float64)

    def _ask(self, step: Step, method: str, *arguments: Any, applied: Applied = "maybe") -> Any:
        self.requests += 1
        future = submit(getattr(self._client, method), arguments, step, applied)
        return wait(future, self._timeout, step, applied)


def _flat(request: Request) -> np.ndarray:
    return np.concatenate([weights.ravel() for _, weights in request]).astype(np.float64)


def _probes(client: Any, data: Sequence[Any] | None) -> list[Any]:
    if data is not None:
        if len(data) < 2:
            raise ValueError("check_backend needs two datums or more")
        return list(data[:2])
    # One begins as the other does, so that what moves one moves the other, and a factor of its own shows.
    tokens = [[7, 3, 11, 5, 2, 13], [7, 3, 11, 5, 2, 13, 9, 6, 8, 12]]
    if _of_tinker(client):
        from tinker import types

        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(ids[:-1]),
                loss_fn_inputs={"target_tokens": np.asarray(ids[1:], np.int64)},
            )
            for ids in tokens
        ]
    return [Datum(ids[:-1], {"target_tokens": np.asarray(ids[1:], np.int64)}) for ids in tokens]


def _settings_of(client: Any) -> Callable[..., Any]:
    if _of_tinker(client):
        from tinker import types

        return types.AdamParams
    return AdamParams


def _of_tinker(client: Any) -> bool:
    return any(base.__module__.split(".")[0] == "tinker" for base in type(client).__mro__)
