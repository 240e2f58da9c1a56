"""Several weights from how the losses go: SoftAdapt, ReLoBRaLo, DWA, FAMO, and uncertainty."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg.base.types import Array, PyTree
from jaxreg.weighting.rule import Moved, Rule, Weights, flag, in_range, registered, static, zero


class _OfValues(Rule):
    """A rule that reads the values of its terms and of the base loss, as one array, the base loss first."""

    def _values(self, out: Any) -> Array:
        own = [out.base_loss.value, *(out.regularizers[name].value for name in self.names)]
        return jnp.stack([jnp.asarray(value, jnp.result_type(float)) for value in own])

    def _by_name(self, weights: Array) -> dict[str, Array]:
        """Divided by the base loss's."""
        return {name: weights[k] / weights[0] for k, name in enumerate(self.names, start=1)}

    def _from_logits(self, logits: Array) -> dict[str, Array]:
        """Of a softmax, divided by the base loss's, though both be too small for float32."""
        return {name: jnp.exp(logits[k] - logits[0]) for k, name in enumerate(self.names, start=1)}

    @property
    def _count(self) -> int:
        return len(self.names) + 1

    def _zeros(self) -> Array:
        return jnp.zeros(self._count, jnp.result_type(float))


@registered
class SoftAdapt(_OfValues):
    """See `softadapt`."""

    beta: Array | float = 0.1

    def _check(self) -> None:
        in_range(self, "beta", self.beta, -jnp.inf, jnp.inf)

    def init(self, weights: Weights) -> Moved:
        """The weights given, and no value yet."""
        return super().init(weights)[0], {"last": self._zeros(), "seen": flag()}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        values = self._values(out)
        change = values - state["last"]
        total = jnp.sum(jnp.abs(change))
        wanted = self._from_logits(self.beta * change / jnp.where(total > 0, total, 1))
        moved = {name: jnp.where(state["seen"], wanted[name], weights[name]) for name in self.names}
        return moved, {"last": values, "seen": state["seen"] | jnp.all(jnp.isfinite(values))}


def softadapt(*names: str, beta: float = 0.1) -> Rule:
    """SoftAdapt (Heydari et al. 2019), normalized: ``softmax(β·sᵢ/Σ|s|)`` of the losses' last changes s.

    Losses that fall slowest, or rise, get more. The base loss is one of them, and all are divided by its
    weight.

    Args:
      names: the terms; none stands for all.
      beta: how strongly; below 0 it favours the losses that fall fastest.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.softadapt()
      SoftAdapt(beta=0.1)
    """
    return SoftAdapt(names, beta)


@registered
class ReLoBRaLo(_OfValues):
    """See `relobralo`."""

    decay: Array | float = 0.9
    temperature: Array | float = 1.0
    lookback: Array | float = 0.9
    seed: int = static(default=0, kw_only=True)

    def _check(self) -> None:
        in_range(self, "decay", self.decay, 0.0, 1.0)
        in_range(self, "temperature", self.temperature, 0.0, jnp.inf, open_low=True)
        in_range(self, "lookback", self.lookback, 0.0, 1.0)

    def init(self, weights: Weights) -> Moved:
        """The weights given, no value yet, and a key."""
        own, _ = super().init(weights)
        every = jnp.stack([jnp.ones_like(zero()), *own.values()])
        state = {"first": self._zeros(), "last": self._zeros(), "weights": every, "seen": flag()}
        return own, state | {"key": jax.random.key_data(jax.random.key(self.seed))}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        values, seen = self._values(out), state["seen"]
        key, draw = jax.random.split(jax.random.wrap_key_data(state["key"]))
        # In float32, so that the draws are the same whether float64 is enabled or not.
        backwards = jax.random.bernoulli(draw, jnp.asarray(1 - self.lookback, jnp.float32))

        def balanced(then: Array) -> Array:
            return self._count * jax.nn.softmax(values / (self.temperature * jnp.where(then == 0, 1, then)))

        history = jnp.where(backwards, balanced(state["first"]), state["weights"])
        every = self.decay * history + (1 - self.decay) * balanced(state["last"])
        known = jnp.all(jnp.isfinite(values))
        every = jnp.where(seen & known, every, state["weights"])
        following = {
            "first": jnp.where(seen, state["first"], values),
            "last": jnp.where(known, values, state["last"]),
            "weights": every,
            "seen": seen | known,
            "key": jax.random.key_data(key),
        }
        wanted = self._by_name(every)
        return {name: jnp.where(seen, wanted[name], weights[name]) for name in self.names}, following


def relobralo(
    *names: str, decay: float = 0.9, temperature: float = 1.0, lookback: float = 0.9, seed: int = 0
) -> Rule:
    """Relative loss balancing with random lookback (Bischof & Kraus 2021).

    ``λ(t, t′) = K·softmax(L(t)/(T·L(t′)))``; ``w ← decay·(ρ·w + (1 − ρ)·λ(t, 0)) + (1 − decay)·λ(t, t − 1)``
    with ρ 1 at the probability ``lookback``, else 0. The base loss is one of the K, and all are divided by
    its weight.

    Args:
      names: the terms; none stands for all.
      decay: from 0 to 1.
      temperature: above 0; large ones make the weights equal.
      lookback: the probability of keeping the history, from 0 to 1.
      seed: of the draws (static).

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.relobralo("boundary")
      ReLoBRaLo('boundary', decay=0.9, temperature=1.0, lookback=0.9, seed=0)
    """
    return ReLoBRaLo(names, decay, temperature, lookback, seed=seed)


@registered
class DWA(_OfValues):
    """See `dwa`."""

    temperature: Array | float = 2.0

    def _check(self) -> None:
        in_range(self, "temperature", self.temperature, 0.0, jnp.inf, open_low=True)

    def init(self, weights: Weights) -> Moved:
        """The weights given, and no values yet."""
        state = {"last": self._zeros(), "count": jnp.zeros((), jnp.int32)}
        return super().init(weights)[0], state

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        values = self._values(out)
        rates = values / jnp.where(state["last"] == 0, 1, state["last"])
        wanted = self._from_logits(rates / self.temperature)
        known = jnp.all(jnp.isfinite(values))
        ready = (state["count"] > 0) & known
        moved = {name: jnp.where(ready, wanted[name], weights[name]) for name in self.names}
        following = {
            "last": jnp.where(known, values, state["last"]),
            "count": state["count"] + known.astype(jnp.int32),
        }
        return moved, following


def dwa(*names: str, temperature: float = 2.0) -> Rule:
    """Dynamic weight average (Liu et al. 2019): ``wᵢ ∝ exp(Lᵢ(t)/Lᵢ(t − 1)/T)``.

    The paper takes means over epochs; here it is steps, so put it under ``every(n)`` or on smooth losses. The
    base loss is one of them, and all are divided by its weight.

    Args:
      names: the terms; none stands for all.
      temperature: above 0; large ones make the weights equal.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.dwa()
      DWA(temperature=2.0)
    """
    return DWA(names, temperature)


@registered
class FAMO(_OfValues):
    """See `famo`."""

    rate: Array | float = 0.025
    decay: Array | float = 0.001

    def _check(self) -> None:
        in_range(self, "rate", self.rate, 0.0, jnp.inf, open_low=True)
        in_range(self, "decay", self.decay, 0.0, 1.0)

    def init(self, weights: Weights) -> Moved:
        """The weights given, equal logits, and no value yet."""
        return super().init(weights)[0], {"logits": self._zeros(), "last": self._zeros(), "seen": flag()}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        values = self._values(out)
        tiny = 1e-8
        logs = jnp.log(jnp.maximum(values, tiny))
        fallen = state["last"] - logs  # how far each logarithm fell with the last step's weights
        _, pull = jax.vjp(jax.nn.softmax, state["logits"])
        (slope,) = pull(fallen)
        logits = state["logits"] - self.rate * (slope + self.decay * state["logits"])
        logits = jnp.where(state["seen"], logits, state["logits"])
        following = {"logits": logits, "last": logs, "seen": state["seen"] | jnp.all(jnp.isfinite(logs))}
        return self._from_logits(logits - jnp.log(jnp.maximum(values, tiny))), following


def famo(*names: str, rate: float = 0.025, decay: float = 0.001) -> Rule:
    """Fast adaptive multitask optimization (Liu et al. 2023): all losses' logarithms fall at equal rates.

    ``wᵢ ∝ softmax(ξ)ᵢ/Lᵢ``, and ξ moves so that the logarithm that fell least gets more. The paper measures
    the fall on the same batch once more; here it is that from one step to the next. Values have to be above
    0. The base loss is one of them, and all are divided by its weight.

    Args:
      names: the terms; none stands for all.
      rate: the step of ξ, above 0.
      decay: the weight decay of ξ, from 0 to 1.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.famo()
      FAMO(rate=0.025, decay=0.001)
    """
    return FAMO(names, rate, decay)


@registered
class Uncertainty(_OfValues):
    """See `uncertainty`."""

    optimizer: optax.GradientTransformation = static(kw_only=True)

    def init(self, weights: Weights) -> Moved:
        """Log-variances with which the weights are those given, and the optimizer's state."""
        own, _ = super().init(weights)
        every = jnp.stack([jnp.ones_like(zero()), *own.values()])
        log_variances = 0 - jnp.log(jnp.maximum(every, 1e-8))
        return own, {"log_variances": log_variances, "optimizer": self.optimizer.init(log_variances)}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        values, last = self._values(out), state["log_variances"]
        slope = 1 - jnp.exp(-last) * values  # d/ds of exp(−s)·value + s
        known = jnp.all(jnp.isfinite(slope))
        step, optimizer = self.optimizer.update(jnp.where(known, slope, 0), state["optimizer"], last)
        moved = jnp.where(known, optax.apply_updates(last, step), last)
        kept = jax.tree.map(lambda new, old: jnp.where(known, new, old), optimizer, state["optimizer"])
        return self._from_logits(-moved), {"log_variances": moved, "optimizer": kept}


def uncertainty(*names: str, optimizer: optax.GradientTransformation) -> Rule:
    """Homoscedastic uncertainty (Kendall et al. 2018): ``Σᵢ exp(−sᵢ)·valueᵢ + sᵢ`` with learned log-variances
    s.

    The log-variances are in the rule's state, ``out.state["rules"]["log_variances"]``, the base loss's first,
    and optax moves them by the closed form of their gradient, ``1 − exp(−s)·value``; ``loss_total`` is
    without ``Σ sᵢ``. Without the
    paper's factor ½ on s. The base loss is one of them, and all weights are divided by its own. Values have
    to be above 0.

    Args:
      names: the terms; none stands for all.
      optimizer: an optax transformation, such as ``optax.adam(1e-2)`` (static: make it once).

    Example:
      >>> import jaxreg as jr, optax
      >>> rule = jr.weighting.uncertainty("depth", optimizer=optax.sgd(0.1))
      >>> rule.init({"depth": 1.0})[1]["log_variances"].tolist()
      [0.0, 0.0]
    """
    return Uncertainty(names, optimizer=optimizer)
