"""An objective taken apart: the plan, which is compiled, and the leaves, which are its arguments."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxreg.base.types import Array, Place, Schedule, TermFn
from jaxreg.core.norms import GradNorms
from jaxreg.core.spec import BASE, StaticPart


class Leaves(NamedTuple):
    """Every array of an objective. Changing one compiles nothing."""

    constants: dict[str, Array]  # every regularizer's weight
    held: dict[str, Array]  # by scheduled term: whether its constant stands in for the schedule
    terms: tuple[tuple[Any, ...], ...]  # what each term holds, the base loss first
    model: tuple[Any, ...]
    weighting: tuple[Any, ...] = ()  # a rule's numbers
    aggregator: tuple[Any, ...] = ()  # and an aggregator's


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of an objective that is not an array. Made by `shared`, so equal plans are one object."""

    names: tuple[str, ...]  # the base loss first
    parts: tuple[StaticPart, ...]
    places: tuple[Place, ...]
    schedules: tuple[Schedule | None, ...]
    model: StaticPart | None
    norms: GradNorms | None
    has_aux: bool = False  # whether the model returns (outputs, what is none)
    weighting: StaticPart | None = None  # the rule that moves weights
    ruled: tuple[str, ...] = ()  # the terms whose weights it moves
    aggregator: StaticPart | None = None  # what replaces the plain sum of the weighted gradients
    additive: tuple[Any, ...] = ()  # by term, what its spec says of the parts of a batch; () where none does

    def fns(self, leaves: Leaves) -> list[TermFn]:
        """The terms, whole again."""
        return [part.with_arrays(held) for part, held in zip(self.parts, leaves.terms, strict=True)]

    def rule(self, leaves: Leaves) -> Any:
        """The rule that moves weights, whole again, or None."""
        return None if self.weighting is None else self.weighting.with_arrays(leaves.weighting)

    def combiner(self, leaves: Leaves) -> Any:
        """The aggregator, whole again, or None."""
        return None if self.aggregator is None else self.aggregator.with_arrays(leaves.aggregator)

    @property
    def on_params(self) -> list[bool]:
        """Which terms are on the params, where they are not the argument of all terms."""
        return [place == "params" and self.model is not None for place in self.places]

    @property
    def space(self) -> Place:
        """Whose gradients the norms are of."""
        return (self.norms or GradNorms()).space(self.model)

    def compiled(self, body: Callable[..., Any]) -> Any:
        """``body(plan, ...)``, jitted for this plan.

        The programs belong to the plan, so that what terms and forward close over (frozen weights, say)
        is freed with the objective: the cache of a jit at the module's level would keep it for ever.
        """
        if body not in self._programs:

            def program(objective: Leaves, x: Any, batch: Any, state: Any, key: Any) -> Any:
                return body(self, objective, x, batch, state, key)  # by name, for JAX's messages

            program.__name__ = f"jaxreg_{body.__name__}"  # the program's name in a profile
            self._programs[body] = jax.jit(program)
        return self._programs[body]

    @functools.cached_property
    def _programs(self) -> dict[Callable[..., Any], Any]:
        return {}

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._fields())

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __hash__(self) -> int:
        return self._hash  # jit asks at every call

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan) or hash(self) != hash(other):
            return False
        return self._fields() == other._fields()

    def __reduce__(self) -> Any:
        return shared, self._fields()


_PLANS: weakref.WeakKeyDictionary[Plan, weakref.ref[Plan]] = weakref.WeakKeyDictionary()


def shared(*fields: Any) -> Plan:
    """The one plan among equal ones, which has the compiled programs."""
    plan = Plan(*fields)
    found = _PLANS.get(plan)
    known = None if found is None else found()
    if known is None:
        _PLANS[plan] = weakref.ref(plan)
        return plan
    return known


def who(name: str) -> str:
    """How errors and profiles call a term."""
    return "base loss" if name == BASE else f"term {name!r}"
