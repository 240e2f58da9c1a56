"""Several rules as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxreg.base.types import Array, PyTree
from jaxreg.weighting.rule import Moved, Rule, Weights, registered


@registered
class Chain(Rule):
    """See `chain`."""

    rules: tuple[Rule, ...] = dataclasses.field(default=(), kw_only=True)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any of them needs."""
        return frozenset().union(*(rule.needs for rule in self.rules))

    def bind(self, terms: Sequence[str]) -> Rule:
        """Each of them for an objective of these regularizers; no two may move one term."""
        rules = tuple(rule.bind(terms) for rule in self.rules)
        movers: dict[str, Rule] = {}
        for rule in rules:
            for name in rule.names:
                if name in movers:
                    raise ValueError(
                        f"chain: two rules move the weight of term {name!r}, {movers[name].who} and "
                        f"{rule.who}; wrap one in the other (clip, warmup, ema), or name the terms of each"
                    )
                movers[name] = rule
        return dataclasses.replace(self, names=tuple(movers), rules=rules)

    def init(self, weights: Weights) -> Moved:
        """All of their first weights, and a state a rule."""
        chosen: dict[str, Array] = {}
        states: dict[str, PyTree] = {}
        for i, rule in enumerate(self.rules):
            own, states[str(i)] = rule.init(weights)
            chosen |= own
        return chosen, states

    def update(self, out: Any, state: PyTree, weights: Weights) -> Moved:
        """All of their next weights, and next states."""
        chosen: dict[str, Array] = {}
        states: dict[str, PyTree] = {}
        for i, rule in enumerate(self.rules):
            own, states[str(i)] = rule.update(out, state[str(i)], weights)
            chosen |= own
        return chosen, states


def chain(*rules: Rule) -> Rule:
    """Several rules, each for terms of its own.

    Raises:
      TypeError: one is no rule.
      ValueError: when it is composed, if two move one term; it names both.

    Example:
      >>> import jaxreg as jr
      >>> rule = jr.weighting.chain(
      ...     jr.weighting.adaptive_kl("kl", target=0.05), jr.weighting.dual_ascent("length", bound=1.0))
      >>> rule.bind(("kl", "length")).names
      ('kl', 'length')
    """
    if not rules:
        raise ValueError("chain: it takes at least one rule")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"chain: it takes rules, such as adaptive_kl(...), got {rule!r}")
    return Chain(rules=rules)
