"""How a metric of the parts of a batch becomes that of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

# "sum": the parts' add up, as means do that are divided by the whole's totals. "max", "min". "root": the
# root of the sum of their squares. "same": every part has the whole's. ("exp", name): exp of another metric,
# a mean in nats. None: not known.
MetricKind: TypeAlias = str | tuple[str, str] | None
KINDS = ("sum", "max", "min", "root", "same")


class Kinds(Mapping[str, MetricKind]):
    """The kinds of a term's metrics by name; those that are not named are of the first one.

    Example:
      >>> kinds = Kinds("sum", max="max")
      >>> kinds["max"], kinds["mean"]
      ('max', 'sum')
    """

    def __init__(self, others: MetricKind, **named: MetricKind) -> None:
        self._others, self._named = others, named

    def and_those_of(self, others: Mapping[str, MetricKind]) -> Kinds:
        """These, and those of another term for names that these do not have."""
        rest = others._others if isinstance(others, Kinds) else None
        return Kinds(rest, **{**others, **self._named})

    def __getitem__(self, name: str) -> MetricKind:
        return self._named.get(name, self._others)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
