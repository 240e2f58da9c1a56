"""Several weights that balance gradients: the jaxpi rule, GradNorm, learning-rate annealing, NTK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxreg.base.norm import sum_of_squares
from jaxreg.base.types import Array, PyTree
from jaxreg.weighting.rule import Moved, Rule, Weights, averaged, flag, in_range, registered, static, zero

BASE = "base_loss"  # a name that no regularizer may have


class _Averaging(Rule):
    """A rule whose weights are moving averages of what each step asks for, from the weights given on.

    The average of a term is its weight times the base loss's average, so that a wrapper that holds the weight
    back (`clip`) holds the average, too.
    """

    decay: Array | float

    def _check(self) -> None:
        in_range(self, "decay", self.decay, 0.0, 1.0)

    def init(self, weights: Weights) -> Moved:
        """The weights given, the base loss's being 1."""
        return super().init(weights)[0], {"base": jnp.ones_like(zero())}

    def _asked(self, out: Any, weights: dict[str, Array]) -> dict[str, Array]:
        """What this step asks for, by name, the base loss among them."""
        raise NotImplementedError

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        asked = self._asked(out, weights)
        known = {name: jnp.isfinite(own) & (own > 0) for name, own in asked.items()}
        base = jnp.where(known[BASE], averaged(self.decay, state["base"], asked[BASE]), state["base"])
        moved = {
            name: averaged(self.decay, weights[name] * state["base"], asked[name]) for name in self.names
        }
        return {name: jnp.where(known[name], moved[name] / base, jnp.nan) for name in self.names}, {
            "base": base
        }


@registered
class GradientBalance(_Averaging):
    """See `gradient_balance`."""

    decay: Array | float = 0.9

    needs: ClassVar[frozenset[str]] = frozenset({"norms"})

    def _asked(self, out: Any, weights: dict[str, Array]) -> dict[str, Array]:
        norms = {BASE: out.base_loss.grad_norm} | {n: out.regularizers[n].grad_norm for n in self.names}
        total = sum(norm / len(norms) for norm in norms.values())
        return {name: total / norm for name, norm in norms.items()}


def gradient_balance(*names: str, decay: float = 0.9) -> Rule:
    """Weights that make all weighted gradients equally long (Wang et al. 2023, jaxpi):
    ``wᵢ = EMA(meanⱼ‖gⱼ‖/‖gᵢ‖)``.

    The base loss is one of them, and all are divided by its weight. Averages begin at the weights given.

    Args:
      names: the terms; none stands for all.
      decay: of the moving averages, from 0 to 1.

    Needs norms. A term whose gradient is 0 keeps its weight.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.gradient_balance("initial", "boundary")
      GradientBalance('initial', 'boundary', decay=0.9)
    """
    return GradientBalance(names, decay)


@registered
class LRAnnealing(_Averaging):
    """See `lr_annealing`."""

    decay: Array | float = 0.9

    needs: ClassVar[frozenset[str]] = frozenset({"norms", "absolutes"})

    def _asked(self, out: Any, weights: dict[str, Array]) -> dict[str, Array]:
        largest = out.base_loss.grad_abs_max
        means = {name: out.regularizers[name].grad_abs_mean for name in self.names}
        return {BASE: jnp.ones_like(largest)} | {name: largest / mean for name, mean in means.items()}


def lr_annealing(*names: str, decay: float = 0.9) -> Rule:
    """Learning-rate annealing (Wang, Teng & Perdikaris 2021): ``wᵢ = EMA(max|∇base| / mean|∇valueᵢ|)``,
    an average that begins at the weight given.

    Args:
      names: the terms; none stands for all.
      decay: of the moving averages, from 0 to 1; the paper's 1 − α.

    Needs ``track_grad_norms=GradNorms(absolutes=True)``, of the params' gradients where there is a
    ``forward``.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.lr_annealing("boundary")
      LRAnnealing('boundary', decay=0.9)
    """
    return LRAnnealing(names, decay)


@registered
class NTK(_Averaging):
    """See `ntk`."""

    decay: Array | float = 0.0
    trace: str = static(default="ntk_trace", kw_only=True)

    def _asked(self, out: Any, weights: dict[str, Array]) -> dict[str, Array]:
        terms = {BASE: out.base_loss} | {name: out.regularizers[name] for name in self.names}
        for name, term in terms.items():
            if self.trace not in term.custom:
                raise KeyError(
                    f"{self.who}: {name!r} reports no metric {self.trace!r}: let it return (value, "
                    f"{{{self.trace!r}: jaxreg.weighting.ntk_trace(...)}})"
                )
        traces = {name: term.custom[self.trace] for name, term in terms.items()}
        total = sum(traces.values())
        return {name: total / trace for name, trace in traces.items()}


def ntk(*names: str, trace: str = "ntk_trace", decay: float = 0.0) -> Rule:
    """Weights from the neural tangent kernel (Wang, Yu & Perdikaris 2022): ``wᵢ = Σⱼ tr Kⱼⱼ / tr Kᵢᵢ``.

    Every term, the base loss too, reports the trace of its own kernel as a metric; all weights are divided by
    the base loss's.

    Args:
      names: the terms; none stands for all.
      trace: the metric's name.
      decay: of moving averages, from 0 (none) to 1.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.ntk("boundary")
      NTK('boundary', decay=0.0, trace='ntk_trace')
    """
    return NTK(names, decay, trace=trace)


def ntk_trace(residual: Callable[[PyTree, Any], Array], params: PyTree, points: PyTree) -> Array:
    """``Σⱼ ‖∂residual(params, pointsⱼ)/∂params‖²``, the trace of a residual's neural tangent kernel.

    Args:
      residual: ``residual(params, point) -> scalar``.
      params: the network's.
      points: leaves [N, ...], one row a point.

    Example:
      >>> import jax.numpy as jnp, jaxreg as jr
      >>> points = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> jr.weighting.ntk_trace(lambda w, x: jnp.dot(w, x), jnp.ones(2), points).item()
      5.0
    """
    rows = jax.vmap(jax.grad(residual), (None, 0))(params, points)
    return jax.lax.stop_gradient(sum_of_squares(jax.tree.leaves(rows)))


@registered
class GradNormRule(Rule):
    """See `gradnorm`."""

    alpha: Array | float = 1.5
    rate: Array | float = 0.025

    needs: ClassVar[frozenset[str]] = frozenset({"norms"})

    def _check(self) -> None:
        in_range(self, "alpha", self.alpha, 0.0, jnp.inf)
        in_range(self, "rate", self.rate, 0.0, jnp.inf, open_low=True)

    def init(self, weights: Weights) -> Moved:
        """The weights given, which the paper's state has with the base loss's, adding up to their number."""
        own, _ = super().init(weights)
        every = _to_sum({BASE: jnp.ones_like(zero()), **own})
        return own, {"weights": every, "first": {name: zero() for name in every}, "seen": flag()}

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        terms = {BASE: out.base_loss} | {name: out.regularizers[name] for name in self.names}
        first = {n: jnp.where(state["seen"], state["first"][n], terms[n].value) for n in terms}
        last, count = state["weights"], len(terms)
        lengths = {name: last[name] * term.grad_norm for name, term in terms.items()}
        mean = sum(length / count for length in lengths.values())
        ratios = {name: term.value / first[name] for name, term in terms.items()}
        usual = sum(ratio / count for ratio in ratios.values())
        moved = {}
        for name, term in terms.items():
            target = mean * jnp.maximum(ratios[name] / usual, 0) ** self.alpha
            moved[name] = last[name] - self.rate * jnp.sign(lengths[name] - target) * term.grad_norm
        # Never to 0 or below, where the paper's weights would not come back from.
        moved = _to_sum({n: jnp.maximum(w, 1e-3 * last[n]) for n, w in moved.items()})
        known = jnp.all(jnp.stack([jnp.isfinite(w) for w in moved.values()]))
        moved = {name: jnp.where(known, moved[name], last[name]) for name in moved}
        following = {"weights": moved, "first": first, "seen": state["seen"] | known}
        return {name: moved[name] / moved[BASE] for name in self.names}, following


def gradnorm(*names: str, alpha: float = 1.5, rate: float = 0.025) -> Rule:
    """GradNorm (Chen et al. 2018): weights that move weighted gradient norms to the mean norm times a term's
    relative inverse training rate to the α.

    A step of gradient descent on ``Σᵢ|wᵢ‖gᵢ‖ − mean·(rᵢ)^α|``, then scaled to add up to their number, the
    base loss among them; all are divided by its weight. Values have to be above 0: a training rate is value
    over first value.

    Args:
      names: the terms; none stands for all.
      alpha: how strongly terms that lag behind are favoured, at least 0.
      rate: the step, above 0, in weight per unit of gradient norm.

    Needs norms; the paper takes those of the last shared layer, ``GradNorms(params=...)``.

    Example:
      >>> import jaxreg as jr
      >>> jr.weighting.gradnorm("depth", "normals")
      GradNormRule('depth', 'normals', alpha=1.5, rate=0.025)
    """
    return GradNormRule(names, alpha, rate)


def _to_sum(weights: dict[str, Array]) -> dict[str, Array]:
    total = sum(weights.values())
    return {name: weight * (len(weights) / total) for name, weight in weights.items()}
