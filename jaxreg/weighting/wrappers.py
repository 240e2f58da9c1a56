"""Rules around a rule: ema, clip, warmup, every, freeze, normalize."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree
from jaxreg.weighting.rule import Moved, Rule, Weights, in_range, is_fresh, registered, whole


class _Wrapper(Rule):
    """It holds the rule inside, and moves the same terms."""

    inner: Rule

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the rule inside needs."""
        return self.inner.needs

    def __post_init__(self) -> None:
        if isinstance(self.inner, str | int | float | type(None)):
            raise TypeError(f"{type(self).__name__.lower()}: it takes a rule first, got {self.inner!r}")
        super().__post_init__()

    def bind(self, terms: Sequence[str]) -> Rule:
        """The rule inside for an objective of these regularizers."""
        inner = self.inner.bind(terms)
        return dataclasses.replace(self, names=inner.names, inner=inner)  # type: ignore[call-arg]

    def _inside(self, weights: Weights) -> tuple[dict[str, Array], PyTree]:
        own, state = self.inner.init(weights)
        return own, {"inner": state}


def _held(weights: Weights) -> dict[str, Array]:
    """The inner rule's own weights, for a wrapper whose own are others."""
    return dict(weights)


@registered
class Ema(_Wrapper):
    """See `ema`."""

    inner: Rule = None  # type: ignore[assignment]
    decay: Array | float = 0.9

    def _check(self) -> None:
        in_range(self, "decay", self.decay, 0.0, 1.0)

    def init(self, weights: Weights) -> Moved:
        """The inner rule's first weights."""
        own, state = self._inside(weights)
        return own, {**state, "own": _held(own)}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """Moved a part of the way."""
        own, inner = self.inner.update(out, state["inner"], {**weights, **state["own"]})
        moved = {n: self.decay * weights[n] + (1 - self.decay) * own[n] for n in self.names}
        moved = _chosen(is_fresh(self.inner, out), moved, {name: weights[name] for name in self.names})
        return moved, {"inner": inner, "own": own}


def ema(rule: Rule, decay: float = 0.9) -> Rule:
    """The moving average of what a rule chooses: ``w ← decay·w + (1 − decay)·chosen``.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.ema(jr.weighting.gradient_share("kl", decay=0.0), 0.99).needs
      frozenset({'norms'})
    """
    return Ema(rule.names if isinstance(rule, Rule) else (), rule, decay)


@registered
class Clip(_Wrapper):
    """See `clip`."""

    inner: Rule = None  # type: ignore[assignment]
    low: Array | float = 0.0
    high: Array | float = 1.0

    def _check(self) -> None:
        in_range(self, "low", self.low, 0.0, jnp.inf)
        in_range(self, "high", self.high, self.low if isinstance(self.low, int | float) else 0.0, jnp.inf)

    def init(self, weights: Weights) -> Moved:
        """The inner rule's first weights, clipped."""
        own, state = self._inside(weights)
        return self._clipped(own), state

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The inner rule's next weights, clipped; it goes on from the clipped ones."""
        own, inner = self.inner.update(out, state["inner"], weights)
        return self._clipped(own), {"inner": inner}

    def _clipped(self, weights: Weights) -> dict[str, Array]:
        return {name: jnp.clip(weights[name], self.low, self.high) for name in self.names}


def clip(rule: Rule, low: float = 0.0, high: float = 1.0) -> Rule:
    """Weights between two bounds, from which the rule inside goes on: it does not wind up beyond them.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.clip(jr.weighting.adaptive_kl("kl", target=0.1), 1e-3, 10.0).names
      ('kl',)
    """
    return Clip(rule.names if isinstance(rule, Rule) else (), rule, low, high)


@registered
class Warmup(_Wrapper):
    """See `warmup`."""

    inner: Rule = None  # type: ignore[assignment]
    steps: Array | int = 100

    def _check(self) -> None:
        whole(self, "steps", self.steps, 1)

    def init(self, weights: Weights) -> Moved:
        """Weights of 0."""
        own, state = self._inside(weights)
        zeros = {name: jnp.zeros_like(weight) for name, weight in own.items()}
        return zeros, {**state, "own": _held(own), "step": jnp.zeros((), jnp.int32)}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The inner rule's, which sees its own weights, times the ramp."""
        own, inner = self.inner.update(out, state["inner"], {**weights, **state["own"]})
        step = state["step"] + 1
        ramp = jnp.minimum(step / self.steps, 1)
        return {n: ramp * own[n] for n in self.names}, {"inner": inner, "own": own, "step": step}


def warmup(rule: Rule, steps: int) -> Rule:
    """Weights that rise from 0 to what the rule chooses, linearly over so many steps.

    Example:
      >>> import jaxreg as jr
      >>> rule = jr.weighting.warmup(jr.weighting.gradient_balance("boundary"), 500)
      >>> rule.init({"boundary": 1.0})[0]["boundary"].item()
      0.0
    """
    return Warmup(rule.names if isinstance(rule, Rule) else (), rule, steps)


@registered
class Every(_Wrapper):
    """See `every`."""

    inner: Rule = None  # type: ignore[assignment]
    steps: Array | int = 10

    def _check(self) -> None:
        whole(self, "steps", self.steps, 1)

    def init(self, weights: Weights) -> Moved:
        """The inner rule's first weights."""
        own, state = self._inside(weights)
        return own, {**state, "since": jnp.zeros((), jnp.int32)}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The inner rule's when it is due and the norms that it needs are fresh, else the same."""
        since = state["since"] + 1
        own, inner = self.inner.update(out, state["inner"], weights)
        last = ({name: weights[name] for name in self.names}, state["inner"])
        moves = (since >= self.steps) & is_fresh(self.inner, out)
        moved, kept = _chosen(moves, (own, inner), last)
        return moved, {"inner": kept, "since": jnp.where(moves, 0, since)}


def every(rule: Rule, steps: int) -> Rule:
    """A rule that moves after every n-th step only; one that needs norms, at the first one then that has
    fresh ones.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.every(jr.weighting.dwa("kl"), 100).names
      ('kl',)
    """
    return Every(rule.names if isinstance(rule, Rule) else (), rule, steps)


@registered
class Freeze(_Wrapper):
    """See `freeze`."""

    inner: Rule = None  # type: ignore[assignment]
    after: Array | int = 1000

    def _check(self) -> None:
        whole(self, "after", self.after, 0)

    def init(self, weights: Weights) -> Moved:
        """The inner rule's first weights."""
        own, state = self._inside(weights)
        return own, {**state, "step": jnp.zeros((), jnp.int32)}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The inner rule's, until it is frozen."""
        own, inner = self.inner.update(out, state["inner"], weights)
        last = ({name: weights[name] for name in self.names}, state["inner"])
        moved, kept = _chosen(state["step"] < self.after, (own, inner), last)
        return moved, {"inner": kept, "step": state["step"] + 1}


def freeze(rule: Rule, after: int) -> Rule:
    """A rule whose weights stay as they are after so many steps.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.freeze(jr.weighting.gradient_balance("kl"), after=1000).names
      ('kl',)
    """
    return Freeze(rule.names if isinstance(rule, Rule) else (), rule, after)


@registered
class Normalize(_Wrapper):
    """See `normalize`."""

    inner: Rule = None  # type: ignore[assignment]
    total: Array | float = 1.0

    def _check(self) -> None:
        in_range(self, "total", self.total, 0.0, jnp.inf, open_low=True)

    def init(self, weights: Weights) -> Moved:
        """The inner rule's first weights, scaled."""
        own, state = self._inside(weights)
        return self._scaled(own), {**state, "own": _held(own)}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The inner rule's, which sees its own weights, scaled."""
        own, inner = self.inner.update(out, state["inner"], {**weights, **state["own"]})
        return self._scaled(own), {"inner": inner, "own": own}

    def _scaled(self, weights: Weights) -> dict[str, Array]:
        whole = sum(weights[name] for name in self.names)
        scale = self.total / jnp.where(whole > 0, whole, 1)
        return {name: weights[name] * scale for name in self.names}


def normalize(rule: Rule, total: float = 1.0) -> Rule:
    """Weights that add up to a given total.

    Example:
      >>> import jaxreg as jr
      >>> rule = jr.weighting.normalize(jr.weighting.gradient_balance("a", "b"))
      >>> [w.item() for w in rule.init({"a": 1.0, "b": 3.0})[0].values()]
      [0.25, 0.75]
    """
    return Normalize(rule.names if isinstance(rule, Rule) else (), rule, total)


def _chosen(yes: Array, new: PyTree, last: PyTree) -> Any:
    return jax.tree.map(lambda new, last: jnp.where(yes, new, last), new, last)
