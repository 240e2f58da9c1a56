"""A run's file, read: each step once, and every number as a series over the steps."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from jaxreg.base.names import did_you_mean
from jaxreg.core.spec import BASE
from jaxreg.watching.records import NAN, Item, Lines, Note, Record, parse

PORTION = 2**20  # bytes read at once
Series: TypeAlias = np.ndarray


class Run:
    """The steps of one run in order, each once, and its notes.

    Where a step's number comes again or goes back (the run went on from an older checkpoint), the later
    line wins: what was recorded from that step on is dropped.

    Attributes:
      name: what a report calls it.
      terms: the regularizers' names, in the order in which they came up.
      skipped: how many lines of the file could not be read.

    Example:
      >>> from jaxreg.watching.records import parse
      >>> run = Run("an example")
      >>> for value in (3.0, 1.0):
      ...     run.add(parse(b'{"loss_total": %f, "base_loss": {"value": 1}, "regularizers": {}}' % value))
      >>> run.steps, run.series("loss/total")
      (array([0, 1]), array([3., 1.]))
    """

    def __init__(self, name: str = "run") -> None:
        self.name = name
        self.skipped = 0
        self.terms: list[str] = []
        self._steps: list[int] = []
        self._columns: dict[str, array[float]] = {}  # shorter than the steps where the last ones miss it
        self._nonfinite: list[tuple[str, ...]] = []
        self._notes: list[tuple[int, Note]] = []  # with the number of steps that stood before it

    def add(self, item: Item) -> None:
        """Take the file's next record or note."""
        if isinstance(item, Note):
            self._notes.append((len(self._steps), item))
            return
        step = item.step
        if step is None:
            step = self._steps[-1] + 1 if self._steps else 0
        elif self._steps and step <= self._steps[-1]:
            self._go_back_to(step)
        self._add(step, item)

    def _add(self, step: int, record: Record) -> None:
        row = len(self._steps)
        for name, value in record.values.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = array("d")
            if (missing := row - len(column)) > 0:
                column.extend(itertools.repeat(NAN, missing))
            column.append(value)
        self._steps.append(step)
        self._nonfinite.append(record.nonfinite)
        self.terms += [name for name in record.terms if name not in self.terms]

    def _go_back_to(self, step: int) -> None:
        end, rows = len(self._steps), bisect.bisect_left(self._steps, step)
        del self._steps[rows:], self._nonfinite[rows:]
        for column in self._columns.values():
            del column[rows:]
        # Notes behind the last dropped record stay: they tell why it ended, or belong to the new start.
        kept = [(at, n) for at, n in self._notes if n.step is None or n.step < step or at == end]
        self._notes = [(min(at, rows), note) for at, note in kept]

    @property
    def steps(self) -> np.ndarray:
        """[S] the steps' numbers, rising."""
        return np.asarray(self._steps, np.int64)

    @property
    def names(self) -> list[str]:
        """Every name that `series` knows."""
        return list(self._columns)

    @property
    def notes(self) -> list[Note]:
        """Warnings, exceptions and compiles, in the file's order."""
        return [note for _, note in self._notes]

    def has(self, name: str) -> bool:
        """Whether `series` knows the name and has a number there."""
        return name in self._columns and not all(map(math.isnan, self._columns[name]))

    def series(self, name: str) -> Series:
        """[S] floats by flat name, NaN where there is none: ``loss/total``, ``loss/base``,
        ``loss/regularizer_total``, ``loss/base/<metric>``, ``grad_norm/total``, ``grad_norm/base``,
        ``reg/<term>/value``, ``…/weight``, ``…/contribution``, ``…/grad_norm``, ``…/grad_norm_weighted``,
        ``…/<metric>``, ``timings/<name>``, ``time``, and whatever the loop logged.

        Raises:
          KeyError: no line of the run has it.
        """
        if name not in self._columns:
            hint = did_you_mean(name, self._columns)
            raise KeyError(f"{self.name} has no series {name!r}; {hint}see run.names")
        values = np.full(len(self._steps), NAN)
        column = self._columns[name]
        values[: len(column)] = column
        return values

    def of(self, term: str, key: str) -> Series:
        """[S] a term's ``"value"``, ``"weight"``, ``"contribution"``, ``"grad_norm"``,
        ``"grad_norm_weighted"`` or metric, NaN where there is none; the base loss has weight 1.
        """
        name = f"reg/{term}/{key}"
        if term == BASE:
            own = {"value": "loss/base", "contribution": "loss/base"}
            own |= {"grad_norm": "grad_norm/base", "grad_norm_weighted": "grad_norm/base"}
            name = own.get(key, f"loss/base/{key}")
            if key == "weight":
                return np.ones(len(self._steps))
        return self.series(name) if name in self._columns else np.full(len(self._steps), NAN)

    def share(self, term: str) -> Series:
        """[S] the term's share of the gradient, from 0 to 1: its weighted norm over the sum of all weighted
        norms, the base loss's (``"base_loss"``) among them. NaN where norms are not tracked, or any is not
        finite.

        Over their sum and not over the norm of the total gradient, because gradients may cancel: two terms
        that pull against each other with equal force leave a total of nearly nothing, of which each would
        be an immense share. The sum bounds the norm of the total (triangle inequality), so the shares are
        what each term would have of the gradient if all pulled one way, and add up to 1.
        """
        if term != BASE and term not in self.terms:
            raise KeyError(f"{self.name} has no term {term!r}; it has {', '.join([BASE, *self.terms])}")
        return self.shares()[term]

    def shares(self) -> dict[str, Series]:
        """`share` of the base loss and of every term, by name."""
        norms = {name: np.abs(self.of(name, "grad_norm_weighted")) for name in (BASE, *self.terms)}
        with np.errstate(over="ignore"):
            whole = np.nansum(list(norms.values()), axis=0)
        for row, names in enumerate(self._nonfinite):
            if any(math.isnan(norms[name][row]) for name in names if name in norms):
                whole[row] = NAN
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.where(whole > 0, norm / whole, NAN) for name, norm in norms.items()}

    def present(self, term: str) -> np.ndarray:
        """[S] whether the step has the term; it may have come or gone when the run was resumed."""
        if term == BASE:
            return np.ones(len(self._steps), bool)
        known = np.isfinite([self.of(term, key) for key in ("value", "weight", "contribution")]).any(axis=0)
        return known | self.nonfinite(term)

    def nonfinite(self, term: str | None = None) -> np.ndarray:
        """[S] whether the term had a number that was not finite; without a name, whether anything had."""
        if term is None:
            return np.array([bool(names) for names in self._nonfinite], bool)
        return np.array([term in names for names in self._nonfinite], bool)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run's file; lines that are torn or are no record are counted in ``run.skipped``.

    Example:
      >>> import tempfile
      >>> line = '{"step": 5, "loss_total": 2.5, "base_loss": {"value": 2.5}, "regularizers": {}}'
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "run.jsonl").write_text(line + chr(10) + line[:20])
      ...     run = read_run(Path(folder, "run.jsonl"))
      >>> run.name, run.steps, run.series("loss/base"), run.skipped
      ('run.jsonl', array([5]), array([2.5]), 1)

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds no step.
    """
    path = Path(path)
    run, tail = Run(path.name), Tail(path)
    for items in (tail.poll, tail.rest):
        for item in items():
            run.add(item)
    run.skipped = tail.skipped
    if not len(run.steps):
        what = f"none of its {run.skipped:,} lines is one" if run.skipped else "it is empty so far"
        if run.notes:
            what = f"only {len(run.notes)} note{'s' * (len(run.notes) > 1)}"
        raise ValueError(f"{path} holds no step of a run: {what}")
    return run


@dataclasses.dataclass
class _Place:
    """Where in which file reading stopped."""

    file: tuple[int, int] = (0, 0)  # device and inode
    offset: int = 0
    before: bytes = b""  # the bytes in front of the offset


class Tail:
    """What a file has got since it was last asked for.

    A line that is half written waits until it is whole. Where the file is truncated or another takes its
    place, reading starts over, and ``restarts`` tells so.

    Attributes:
      restarts: how often the file was another one.

    Example:
      >>> import tempfile
      >>> line = '{"step": %d, "loss_total": 2.5, "base_loss": {}, "regularizers": {}}'
      >>> with tempfile.TemporaryDirectory() as folder, open(Path(folder, "run.jsonl"), "w") as file:
      ...     tail = Tail(file.name)
      ...     for part in (line % 0 + chr(10) + line[:9], line[9:] % 1 + chr(10)):
      ...         _ = file.write(part), file.flush()
      ...         print([record.step for record in tail.poll()])
      [0]
      [1]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.restarts = 0
        self._start()

    def _start(self) -> None:
        self._lines, self._refused, self._place = Lines(), 0, _Place()

    @property
    def skipped(self) -> int:
        """How many lines could not be read."""
        return self._refused + self._lines.skipped

    def poll(self) -> Iterator[Item]:
        """The records and notes that are new; take them all.

        Raises:
          OSError: the file cannot be read; it may come (again) later.
        """
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            which = (status.st_dev, status.st_ino)
            if self._place.offset and not self._goes_on(file, which, status.st_size):
                self._start()
                self.restarts += 1
            file.seek(self._place.offset)
            while portion := file.read(PORTION):
                before = (self._place.before + portion)[-64:]
                self._place = _Place(which, self._place.offset + len(portion), before)
                for line in self._lines.feed(portion):
                    yield from self._parsed(line)

    def _goes_on(self, file: BinaryIO, which: tuple[int, int], size: int) -> bool:
        """Whether it is the same file, grown. A file written anew in place shows in the bytes before."""
        if which != self._place.file or size < self._place.offset:
            return False
        before = self._place.before
        file.seek(self._place.offset - len(before))
        return file.read(len(before)) == before

    def rest(self) -> list[Item]:
        """What stands in the last line, though no newline ends it: for a file that grows no more."""
        return [item for line in self._lines.rest() for item in self._parsed(line)]

    def _parsed(self, line: bytes) -> list[Item]:
        try:
            return [parse(line)]
        except ValueError:
            self._refused += 1
            return []
