"""Does a rule keep the contract that the built-in ones keep?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.shown import called, described
from jaxreg.base.types import Array, PyTree
from jaxreg.core.named import Regularizers
from jaxreg.core.output import BaseLossOutput, CustomLossOutput, RegularizerOutput

STEPS = 12


class RuleCheckError(AssertionError):
    """A rule breaks the contract; the message names every property that failed, and where."""


def check_rule(
    rule: Any, *, terms: Sequence[str] = ("a", "b", "c"), metrics: Sequence[str] = (), seed: int = 0
) -> None:
    """Check a rule of your own as the built-in ones are checked.

    Over steps with made-up values and norms: it gives weights of its own terms only, finite and not negative,
    at values and norms from 1e-15 to 1e15 and at gradients of 0, too; its state keeps its structure and
    dtypes; ``jit`` and ``vmap`` change nothing, and the next step compiles nothing; a step with NaN or ∞ does
    not stick; it reads only what it says that it needs, and goes by no norms that are not fresh.

    Args:
      rule: of `jaxreg.weighting`, or one's own.
      terms: the objective's regularizers; those that the rule names have to be among them.
      metrics: custom metrics that every term reports, if the rule reads some.
      seed: of the numbers.

    Raises:
      RuleCheckError: naming every property that does not hold.

    Example:
      >>> import jaxreg as jr
      >>> jr.testing.check_rule(jr.weighting.gradient_balance("a", "b"))
      >>> forgetful = jr.weighting.custom("a", lambda w: (w, {"n": w["a"]}), lambda out, s, w: (w, {}))
      >>> jr.testing.check_rule(forgetful)
      Traceback (most recent call last):
      jaxreg.testing.rules.RuleCheckError: ...
    """
    subject = _Subject(rule, tuple(terms), tuple(metrics), seed)
    failures = [f"- {name}: {what}" for name, check in _CHECKS.items() if (what := _tried(check, subject))]
    if failures:
        raise RuleCheckError("\n".join([f"{called(rule)} as a rule:", *failures]))


class _Subject:
    def __init__(self, rule: Any, terms: tuple[str, ...], metrics: tuple[str, ...], seed: int) -> None:
        self.rule, self.terms, self.metrics = rule.bind(terms), terms, metrics
        rng = np.random.default_rng(seed)
        self.values, self.norms = np.exp(rng.normal(0, 0.4, (2, STEPS, len(terms) + 1)))
        self.update = jax.jit(self.rule.update)
        self.weights: dict[str, Array] = {name: jnp.full((), 0.7) for name in terms}

    def output(
        self,
        values: np.ndarray,
        norms: np.ndarray,
        *,
        age: int | None = None,
        needs: frozenset[str] = frozenset({"norms", "absolutes"}),
    ) -> Any:
        """A step's output of these numbers, the base loss first."""

        def rest(k: int) -> dict[str, Any]:
            measured: dict[str, Any] = {"custom": {name: jnp.float32(values[k]) for name in self.metrics}}
            norm = jnp.float32(norms[k])
            if needs:
                measured["grad_norm"] = norm
            if "absolutes" in needs:
                measured |= {"grad_abs_max": norm, "grad_abs_mean": norm / 3}
            return measured

        out = [jnp.float32(value) for value in values]
        records = Regularizers(
            (name, RegularizerOutput(name=name, value=out[k], weight=out[k], contribution=out[k], **rest(k)))
            for k, name in enumerate(self.terms, 1)
        )
        stale = None if age is None else jnp.int32(age)
        return CustomLossOutput(out[0], BaseLossOutput(out[0], **rest(0)), records, out[0], norms_age=stale)

    def begun(self) -> tuple[dict[str, Array], PyTree]:
        """The first step's weights, of all terms, and the first state."""
        chosen, state = self.rule.init(self.weights)
        return self.weights | chosen, state

    def run(self, values: np.ndarray, norms: np.ndarray) -> list[dict[str, Any]]:
        """The weights after every step."""
        chosen, state = self.rule.init(self.weights)
        found = []
        for row in zip(values, norms, strict=True):
            chosen, state = self.update(self.output(*row), state, {**self.weights, **chosen})
            found.append({name: np.asarray(weight) for name, weight in chosen.items()})
        return found


def _tried(check: Callable[[_Subject], str | None], subject: _Subject) -> str | None:
    try:
        return check(subject)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def _names(subject: _Subject) -> str | None:
    own = set(subject.rule.names)
    first, state = subject.rule.init(subject.weights)
    after, _ = subject.rule.update(
        subject.output(subject.values[0], subject.norms[0]), state, subject.weights | first
    )
    for when, weights in (("init", first), ("update", after)):
        if set(weights) != own:
            return f"{when} gives weights of {sorted(weights)}, and it names {sorted(own)}"
    return None


def _state(subject: _Subject) -> str | None:
    weights, state = subject.begun()
    _, following = subject.rule.update(subject.output(subject.values[0], subject.norms[0]), state, weights)
    if _described(following) != _described(state):
        return f"it was {_described(state)} and became {_described(following)}"
    return None


def _jit(subject: _Subject) -> str | None:
    weights, state = subject.begun()
    out = subject.output(subject.values[0], subject.norms[0])
    eager, _ = subject.rule.update(out, state, weights)
    traced, _ = subject.update(out, state, weights)
    same = all(np.allclose(eager[name], traced[name], rtol=1e-4) for name in subject.rule.names)
    return None if same else f"{_plain(eager)} became {_plain(traced)}"


def _vmap(subject: _Subject) -> str | None:
    weights, state = subject.begun()
    outs = [subject.output(*row) for row in zip(subject.values[:3], subject.norms[:3], strict=True)]
    alone = [subject.update(out, state, weights)[0] for out in outs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
    together, _ = jax.jit(jax.vmap(subject.rule.update, (0, None, None)))(stacked, state, weights)
    for name in subject.rule.names:
        one_by_one = [float(moved[name]) for moved in alone]
        if not np.allclose(together[name], one_by_one, rtol=1e-4):
            return f"weights of {name!r}, {one_by_one}, became {np.asarray(together[name]).tolist()}"
    return None


def _compiles(subject: _Subject) -> str | None:
    traces = 0

    def update(*arguments: Any) -> Any:
        nonlocal traces
        traces += 1
        return subject.rule.update(*arguments)

    compiled = jax.jit(update)
    weights, state = subject.begun()
    for values, norms in zip(subject.values[:3], subject.norms[:3], strict=True):
        chosen, state = compiled(subject.output(values, norms), state, weights)
        weights = weights | chosen
    return f"three steps traced it {traces} times" if traces > 1 else None


def _ranges(subject: _Subject) -> str | None:
    for scale in (1.0, 1e-15, 1e15):
        for v, n in ((scale, 1.0), (1.0, scale), (scale, scale)):
            for t, weights in enumerate(subject.run(subject.values * v, subject.norms * n)):
                if bad := _no_weights(weights):
                    return f"at {v:g} times the values and {n:g} times the norms, step {t}: {bad}"
    return None


def _zero(subject: _Subject) -> str | None:
    for k in range(len(subject.terms) + 1):
        norms = subject.norms.copy()
        norms[2:5, k] = 0
        for t, weights in enumerate(subject.run(subject.values, norms)):
            if bad := _no_weights(weights):
                whose = "the base loss" if k == 0 else repr(subject.terms[k - 1])
                return f"where the gradient of {whose} is 0, step {t}: {bad}"
    return None


def _sticks(subject: _Subject) -> str | None:
    for wrong in (np.nan, np.inf):
        values, norms = subject.values.copy(), subject.norms.copy()
        values[3], norms[5] = wrong, wrong
        if bad := _no_weights(subject.run(values, norms)[-1]):
            return f"{bad} long after a step of {wrong}"
    return None


def _needs(subject: _Subject) -> str | None:
    weights, state = subject.begun()
    subject.rule.update(
        subject.output(subject.values[0], subject.norms[0], needs=subject.rule.needs), state, weights
    )
    return None


def _waits(subject: _Subject) -> str | None:
    if not subject.rule.needs:
        return None
    weights, state = subject.begun()
    one, other = (
        subject.rule.update(subject.output(subject.values[0], norms, age=1), state, weights)
        for norms in (subject.norms[0], subject.norms[1])
    )
    moved = [n for n in subject.rule.names if float(one[0][n]) != float(other[0][n])]
    if moved:
        return f"weights of {moved} go by norms that are a step old"
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one[1], other[1])
    return None if all(jax.tree.leaves(same)) else "its state takes over norms that are a step old"


def _described(state: PyTree) -> str:
    leaves, structure = jax.tree.flatten(state)
    return f"{structure} of {[described(leaf) for leaf in leaves]}"


def _no_weights(weights: dict[str, Any]) -> dict[str, float]:
    """Those that are not finite, or negative."""
    return {name: w for name, w in _plain(weights).items() if not (np.isfinite(w) and w >= 0)}


def _plain(weights: dict[str, Any]) -> dict[str, float]:
    return {name: float(weight) for name, weight in weights.items()}


_CHECKS: dict[str, Callable[[_Subject], str | None]] = {
    "weights of its own terms": _names,
    "a state of one structure": _state,
    "the same under jit": _jit,
    "the same under vmap": _vmap,
    "it compiles once": _compiles,
    "finite and not negative": _ranges,
    "gradients of 0": _zero,
    "NaN and ∞ do not stick": _sticks,
    "it reads only what it needs": _needs,
    "it waits for fresh norms": _waits,
}
