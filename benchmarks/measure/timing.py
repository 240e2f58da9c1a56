"""Contestants take turns, so that whatever else the machine does meets them all alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.measure.others import ticks

SHORTEST_TURN = 0.2  # Seconds; a quicker call is repeated, and its median counts.
SETTLE = 0.3  # Seconds; threads of the process that ran last stop spinning in that time.
QUIET = 0.05  # Share of the CPUs that others may use; turns with more are taken again,
RETRIES = 40  # but no more often than this in all.

Turn = Callable[[], float]  # run once (or often, if quick) and return the seconds of one call


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds by contestant, one a round, and what share of the CPUs other processes used."""

    seconds: Mapping[str, Sequence[float]]
    others: Sequence[float]

    @property
    def rounds(self) -> int:
        """How many turns each contestant had."""
        return max(map(len, self.seconds.values()), default=0)

    def __str__(self) -> str:
        share = f"{median(self.others):.0%} of the CPUs, at most {max(self.others):.0%}"
        return f"{self.rounds} rounds, while other processes used {share}."


def timed_turn(call: Callable[[], object]) -> float:
    """Seconds of one call, which must wait until its result is there."""
    seconds: list[float] = []
    while sum(seconds) < SHORTEST_TURN:
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result
    return median(seconds)


def take_turns(
    groups: Sequence[Mapping[str, Turn]],
    processes: Sequence[int],
    *,
    budget: float,
    fewest: int,
    retries: int = RETRIES,
) -> Timings:
    """Let every contestant of every group run once a round.

    The members of a group share a process (``processes`` are all of ours), and the others are idle
    while one runs. Rounds go on until the budget (seconds) is spent; each starts with another
    member of the group. A group's turns that others disturbed do not count and are taken again.
    """
    seconds: dict[str, list[float]] = {name: [] for group in groups for name in group}
    others: list[float] = []
    spent, rounds = 0.0, 0
    while rounds < fewest or spent < budget:
        for group in groups:
            first = rounds % max(len(group), 1)
            names = [*group][first:] + [*group][:first]
            while True:
                time.sleep(SETTLE)
                start, before = time.perf_counter(), ticks(processes)
                turns = {name: group[name]() for name in names}
                share = before.others_until(ticks(processes))
                if share <= QUIET or not retries:
                    break
                retries -= 1
                time.sleep(2.0)
            spent += time.perf_counter() - start
            others.append(share)
            for name, turn in turns.items():
                seconds[name].append(turn)
        rounds += 1
    return Timings(seconds, others)
