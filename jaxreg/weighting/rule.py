"""What a rule is: a pair of pure functions over a pytree state.

``init(weights)`` gives the first weights of the terms that it moves, and its state;
``update(out, state, weights)`` gives the next step's weights, of this step's output. A rule is a frozen
dataclass and a pytree: its numbers are leaves, and changing one compiles nothing.

The base loss has weight 1 by definition. Rules whose papers weigh all losses are divided by the base loss's
weight, an overall scale which Adam and its kin do not see.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.base.names import did_you_mean
from jaxreg.base.pytrees import registered_dataclass
from jaxreg.base.shown import called
from jaxreg.base.types import Array, PyTree

Weights: TypeAlias = Mapping[str, Array]
Moved: TypeAlias = tuple[dict[str, Array], PyTree]
T = TypeVar("T")


def static(**rest: Any) -> Any:
    """A field that is a choice and no number."""
    return dataclasses.field(metadata={"static": True}, **rest)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def registered(kind: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree of its numbers."""
    return registered_dataclass(dataclasses.dataclass(frozen=True, repr=False)(kind))


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
    """The base of all rules.

    Attributes:
      names: the terms whose weights it moves; none stands for all regularizers of the objective.
      needs: what it reads of the output besides the values: ``"norms"``, ``"absolutes"``.

    Example:
      >>> import jaxreg as jr
      >>> rule = jr.weighting.gradient_balance().bind(("kl", "l2"))
      >>> rule.names, sorted(rule.needs)
      (('kl', 'l2'), ['norms'])
    """

    names: tuple[str, ...] = static(default=())

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"{self.who}: it moves terms by their names, strings; got {name!r}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"{self.who}: a term is named twice in {list(self.names)}")
        self._check()

    def __repr__(self) -> str:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)[1:]]
        shown = [f"{name}={called(value)}" for name, value in fields if value is not None]
        return f"{type(self).__name__}({', '.join([*map(repr, self.names), *shown])})"

    def _shown(self) -> str:
        return repr(self)

    @property
    def who(self) -> str:
        """What errors call it."""
        return f"rule {type(self).__name__}" + (
            f" of {', '.join(map(repr, self.names))}" if self.names else ""
        )

    def bind(self, terms: Sequence[str]) -> Rule:
        """The rule for an objective of these regularizers.

        Raises:
          KeyError: it names one that there is not; the nearest is suggested.
        """
        for name in self.names:
            if name not in terms:
                raise KeyError(
                    f"{self.who}: no term is named {name!r}; {did_you_mean(name, terms)}the terms are "
                    f"{list(terms)}"
                )
        if not self.names and not terms:
            raise ValueError(f"{self.who}: the objective has no regularizer whose weight it could move")
        return self if self.names else dataclasses.replace(self, names=tuple(terms))

    def init(self, weights: Weights) -> Moved:
        """The first weights of its terms, of the objective's first weights, and the first state."""
        return {name: _weight(weights[name]) for name in self.names}, {}

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """The next step's weights of its terms, and the next state.

        Where norms are measured now and then, a rule that needs them waits for fresh ones. A weight that
        would not be finite stays as it is.

        Args:
          out: the step's `jaxreg.CustomLossOutput`.
          state: of `init`, or the last `update`.
          weights: this step's, of its terms at least.
        """
        self._check_measured(out)
        before = {name: _weight(weights[name]) for name in self.names}
        after, following = self._move(out, state, before)
        after = {name: jnp.asarray(after[name]).astype(before[name].dtype) for name in self.names}
        sound = {name: jnp.isfinite(after[name]) for name in self.names}
        after = {
            name: jnp.where(sound[name], jnp.maximum(after[name], 0), before[name]) for name in self.names
        }
        following = jax.tree.map(_kept, state, following)
        if self.needs and out.norms_age is not None:
            fresh = is_fresh(self, out)
            after, following = jax.tree.map(
                lambda new, last: jnp.where(fresh, new, last), (after, following), (before, state)
            )
        return after, following

    def _check_measured(self, out: Any) -> None:
        """Refuse an output without what the rule needs, and name the term."""
        if not self.needs:
            return
        if out.base_loss.grad_norm is None:
            raise ValueError(
                f"{self.who}: it reads the norms of the terms' gradients, and this output has none: compose "
                f"with track_grad_norms=True and call objective.value_and_grad(...)"
            )
        for name in self.names:
            if out.regularizers[name].grad_norm is None:
                raise ValueError(
                    f"{self.who}: term {name!r} is on params and has no gradient at the outputs, whose norms "
                    f"are tracked: track those of the params, GradNorms(wrt='params'), or name other terms"
                )

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        raise NotImplementedError

    def _check(self) -> None:
        """Refuse numbers that are out of range."""


@registered
class Custom(Rule):
    """A rule of two functions; see `custom`."""

    begin: Callable[..., Moved] = static(kw_only=True)
    move: Callable[..., Moved] = static(kw_only=True)
    reads: frozenset[str] = static(default=frozenset(), kw_only=True)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """As it was said."""
        return self.reads

    def init(self, weights: Weights) -> Moved:
        """What the first function gives."""
        chosen, state = self._of_its_own("init", self.begin({n: _weight(weights[n]) for n in self.names}))
        return {name: _weight(chosen[name]) for name in self.names}, state

    def _move(self, out: Any, state: PyTree, weights: dict[str, Array]) -> Moved:
        return self._of_its_own("update", self.move(out, state, weights))

    def _of_its_own(self, which: str, moved: Any) -> Moved:
        """Refuse what is no pair, and weights of other terms than those named."""
        if not isinstance(moved, tuple) or len(moved) != 2 or not isinstance(moved[0], Mapping):
            raise TypeError(
                f"{self.who}: {which} returns (weights by name, state), got {type(moved).__name__}: {moved!r}"
            )
        chosen, state = moved
        if set(chosen) != set(self.names):
            raise ValueError(
                f"{self.who}: {which} gives weights of {sorted(chosen)}, and the rule names "
                f"{sorted(self.names)}: give every one of those and no other"
            )
        return dict(chosen), state


def custom(
    names: str | Sequence[str],
    init: Callable[..., Moved],
    update: Callable[..., Moved],
    needs: Sequence[str] = (),
) -> Rule:
    """A rule of one's own from two pure functions.

    Args:
      names: the terms whose weights it moves.
      init: ``init(weights) -> (first weights, state)``, both by name.
      update: ``update(out, state, weights) -> (next weights, next state)``.
      needs: what it reads besides values: ``"norms"``, ``"absolutes"``.

    Example:
      >>> import jaxreg as jr
      >>> halve = jr.weighting.custom("kl", lambda w: (w, {}), lambda out, s, w: ({"kl": w["kl"] / 2}, s))
      >>> kl = dict(name="kl", fn=lambda x, b: x, weight=1.0)
      >>> objective = jr.compose(lambda x, b: x, [kl], weighting=halve)
      >>> (_, out), _ = objective.value_and_grad(1.0, state=objective.init())
      >>> float(out.state["weights"]["kl"])
      0.5
    """
    unknown = set(needs) - {"norms", "absolutes"}
    if unknown:
        raise ValueError(f"custom: needs are 'norms' and 'absolutes', got {sorted(unknown)}")
    return Custom(as_names(names), begin=init, move=update, reads=frozenset(needs))


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def in_range(rule: Rule, name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number that is out of range. What is no number yet (a tracer) passes."""
    if isinstance(value, str | bool | type(None)):
        raise TypeError(f"{rule.who}: {name} is a number, got {value!r}")
    if not isinstance(value, int | float | np.generic):
        return
    value = float(value)
    if not (low < value if open_low else low <= value) or not value <= high or not np.isfinite(value):
        bound = f"{low:g} {'<' if open_low else '≤'} {name}" + (f" ≤ {high:g}" if np.isfinite(high) else "")
        raise ValueError(f"{rule.who}: {bound}, got {value:g}")


def whole(rule: Rule, name: str, value: Any, least: int) -> None:
    """Refuse a number of steps that is no whole number, or too small. A tracer passes."""
    in_range(rule, name, value, least, np.inf)
    if isinstance(value, int | float | np.generic) and float(value) != int(value):
        raise ValueError(f"{rule.who}: {name} is a whole number of steps, got {value:g}")


def averaged(decay: Array | float, last: Array, new: Array) -> Array:
    """A moving average, one number further."""
    return decay * last + (1 - decay) * new


def is_fresh(rule: Rule, out: Any) -> Array:
    """Whether a rule may go by this output: it needs no norms, or they are this step's own."""
    if not rule.needs or out.norms_age is None:
        return jnp.ones((), bool)
    return jnp.asarray(out.norms_age == 0)


def zero() -> Array:
    """0 in the dtype of weights."""
    return jnp.zeros((), jnp.result_type(float))


def flag() -> Array:
    """No, for a state."""
    return jnp.zeros((), bool)


def _weight(weight: Any) -> Array:
    return jnp.asarray(weight, jnp.result_type(float))


def _kept(last: Any, new: Any) -> Any:
    """The next state in the dtypes of the last; numbers that are not finite are not taken over."""
    if jnp.issubdtype(jnp.result_type(last), jnp.floating):
        new = jnp.asarray(new).astype(jnp.result_type(last))
        return jnp.where(jnp.isfinite(new), new, last)
    return new
