"""One weight and a number that the term is to reach: a target, a bound, a share; or a schedule."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp

from jaxreg.base.types import Array, PyTree, Schedule
from jaxreg.weighting.rule import Moved, Rule, Weights, averaged, flag, in_range, registered, static, zero


@registered
class ScheduleRule(Rule):
    """See `schedule`."""

    fn: Schedule = static(kw_only=True)

    def _check(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"{self.who}: a schedule is a function of the step, got {self.fn!r}")

    def init(self, weights: Weights) -> Moved:
        """The schedule's first weight."""
        first = jnp.asarray(self.fn(jnp.zeros((), jnp.int32)), jnp.result_type(float))
        return dict.fromkeys(self.names, first), {"step": jnp.zeros((), jnp.int32)}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        step = state["step"] + 1
        return dict.fromkeys(self.names, jnp.asarray(self.fn(step))), {"step": step}


def schedule(name: str, fn: Schedule) -> Rule:
    """The weight follows a function of the step, such as optax's schedules.

    The same as giving the schedule for a weight; as a rule it can be wrapped and chained.

    Example:
      >>> import jaxreg as jr, optax
      >>> jr.weighting.schedule("kl", optax.linear_schedule(0.0, 1.0, 100)).init({"kl": 0.0})[0]["kl"].item()
      0.0
    """
    return ScheduleRule((name,), fn=fn)


@registered
class AdaptiveKL(Rule):
    """See `adaptive_kl`."""

    target: Array | float = 0.05
    gain: Array | float = 0.1
    limit: Array | float = 0.2

    def _check(self) -> None:
        in_range(self, "target", self.target, 0.0, jnp.inf, open_low=True)
        in_range(self, "gain", self.gain, 0.0, 1.0, open_low=True)
        in_range(self, "limit", self.limit, 0.0, 1.0, open_low=True)

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        (name,) = self.names
        value = out.regularizers[name].value
        error = jnp.clip(value / self.target - 1, -self.limit, self.limit)
        error = jnp.where(jnp.isfinite(value), error, jnp.nan)  # which moves nothing
        return {name: weights[name] * (1 + self.gain * error)}, state


def adaptive_kl(name: str, *, target: float, gain: float = 0.1, limit: float = 0.2) -> Rule:
    """The weight that keeps a term at a target (Ziegler et al. 2019):
    ``w ← w·(1 + gain·clip(value/target − 1))``.

    Begin with a weight above 0: 0 stays 0. A value that is NaN or ∞ moves nothing.

    Args:
      name: the term, such as a KL to a reference.
      target: its value to be, above 0, in the term's own unit.
      gain: how fast, above 0 and at most 1.
      limit: the relative error at which it is cut, above 0.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.adaptive_kl("kl", target=0.05)
      AdaptiveKL('kl', target=0.05, gain=0.1, limit=0.2)
    """
    return AdaptiveKL((name,), target, gain, limit)


@registered
class DualAscent(Rule):
    """See `dual_ascent`."""

    bound: Array | float = 0.0
    rate: Array | float = 0.01

    def _check(self) -> None:
        in_range(self, "bound", self.bound, -jnp.inf, jnp.inf)
        in_range(self, "rate", self.rate, 0.0, jnp.inf, open_low=True)

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        (name,) = self.names
        return {name: weights[name] + self.rate * (out.regularizers[name].value - self.bound)}, state


def dual_ascent(name: str, *, bound: float, rate: float = 0.01) -> Rule:
    """The Lagrange multiplier of ``value ≤ bound``: ``w ← max(0, w + rate·(value − bound))``.

    A constraint in place of a penalty: where the bound is not reached the weight falls to 0.

    Args:
      name: the term.
      bound: what its value is not to exceed.
      rate: the step, above 0, in weight per unit of the value.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.dual_ascent("kl", bound=0.1)
      DualAscent('kl', bound=0.1, rate=0.01)
    """
    return DualAscent((name,), bound, rate)


@registered
class Geco(Rule):
    """See `geco`."""

    bound: Array | float = 0.0
    rate: Array | float = 0.01
    decay: Array | float = 0.99

    def _check(self) -> None:
        in_range(self, "bound", self.bound, -jnp.inf, jnp.inf)
        in_range(self, "rate", self.rate, 0.0, jnp.inf, open_low=True)
        in_range(self, "decay", self.decay, 0.0, 1.0)

    def init(self, weights: Weights) -> Moved:
        """The weight given, and an average of nothing yet."""
        return super().init(weights)[0], {"average": zero(), "seen": flag()}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        (name,) = self.names
        value = out.regularizers[name].value
        average = jnp.where(state["seen"], averaged(self.decay, state["average"], value), value)
        grown = weights[name] * jnp.exp(jnp.clip(self.rate * (average - self.bound), -20, 20))
        grown = jnp.where(jnp.isfinite(value), grown, jnp.nan)  # which moves nothing
        return {name: grown}, {"average": average, "seen": state["seen"] | jnp.isfinite(value)}


def geco(name: str, *, bound: float, rate: float = 0.01, decay: float = 0.99) -> Rule:
    """The multiplier of ``value ≤ bound`` by its logarithm (Rezende & Viola 2018):
    ``w ← w·exp(rate·(EMA − bound))``.

    Args:
      name: the term. Begin with a weight above 0.
      bound: what the value's moving average is not to exceed.
      rate: the step of the logarithm, above 0.
      decay: of the moving average, from 0 to 1.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.geco("recon", bound=0.2)
      Geco('recon', bound=0.2, rate=0.01, decay=0.99)
    """
    return Geco((name,), bound, rate, decay)


@registered
class GradientShare(Rule):
    """See `gradient_share`."""

    share: Array | float = 0.1
    decay: Array | float = 0.9

    needs: ClassVar[frozenset[str]] = frozenset({"norms"})

    def _check(self) -> None:
        in_range(self, "share", self.share, 0.0, jnp.inf)
        in_range(self, "decay", self.decay, 0.0, 1.0)

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        (name,) = self.names
        ratio = out.base_loss.grad_norm / out.regularizers[name].grad_norm  # ∞ where the term has no gradient
        # ∞ as a weight is one that is not taken over: it stays as it is.
        return {name: averaged(self.decay, weights[name], self.share * ratio)}, state


def gradient_share(name: str, *, share: float = 0.1, decay: float = 0.9) -> Rule:
    """The weight with which a term's gradient is a stated share of the base loss's:
    ``w = share·EMA(‖g_base‖/‖g‖)``.

    Args:
      name: the term.
      share: its weighted gradient norm over the base loss's, at least 0.
      decay: of the moving average, which begins at the weight given; from 0 to 1.

    Needs norms. Where the term's gradient is 0 the weight stays; where it is nearly 0 at first, as of a KL to
    the model itself, the ratio is immense for a while: put ``clip(rule, 0.0, most)`` around it, from which
    the average goes on.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.gradient_share("entropy", share=0.2)
      GradientShare('entropy', share=0.2, decay=0.9)
    """
    return GradientShare((name,), share, decay)
