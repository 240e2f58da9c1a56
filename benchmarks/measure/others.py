"""What share of the machine other processes use, where the system says (Linux)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Ticks(NamedTuple):
    """The kernel's clock ticks so far, over all CPUs."""

    total: int
    busy: int
    ours: int

    def others_until(self, later: Ticks) -> float:
        """Share of the CPUs that went to others since; 0 where nothing is known."""
        busy, ours = later.busy - self.busy, later.ours - self.ours
        return max(busy - ours, 0) / max(later.total - self.total, 1)


def ticks(processes: Sequence[int]) -> Ticks:
    """The ticks now; ``processes`` are ours."""
    if not (PROC / "stat").exists():
        return Ticks(0, 0, 0)
    cpu = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = cpu[3] + cpu[4]  # idle and waiting for a disk; the last, stolen time, is others' too
    return Ticks(sum(cpu), sum(cpu) - idle, sum(map(_of_process, processes)))


def _of_process(process: int) -> int:
    fields = (PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # in user and in system mode
