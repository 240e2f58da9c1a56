"""A board as a table for a terminal, as wide as there is room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from jaxreg.core.spec import BASE
from jaxreg.watching.board import NOTES, Against, Board, Row, buckets

HEAD, FOOT = 4, 3  # lines around the terms: the progress, a blank, headings, a rule; total, a blank, counts
DIM, BAR, BAD, WARN = "bright_black", "cyan", "red", "yellow"
LEVELS = {"error": BAD, "warning": WARN}
PAIRS, HEAT = 3, 20  # pairs of terms that are shown pulling against each other; cells of their strips


@dataclasses.dataclass(frozen=True, slots=True)
class Signs:
    """What the table is drawn with; plain ASCII where the encoding has no more."""

    trend: str = "▁▂▃▄▅▆▇█"
    eighths: str = "▏▎▍▌▋▊▉█"
    full: str = "━"
    empty: str = "━"
    rule: str = "─"
    gap: str = " · "
    missing: str = "–"
    broken: str = "×"
    cut: str = "…"
    norm: str = "w·‖grad‖"  # of the weighted gradient
    heat: str = "·░▒▓█"

    @classmethod
    def of(cls, encoding: str) -> Signs:
        """The signs that the encoding can write.

        Example:
          >>> Signs.of("utf-8").cut, Signs.of("ascii").cut
          ('…', '~')
        """
        signs = cls()
        try:
            "".join(getattr(signs, field.name) for field in dataclasses.fields(cls)).encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return cls("_.-~=+*#", "-=#", "#", ".", "-", ", ", "-", "x", "~", "w*|grad|", ".:+#@")
        return signs


@dataclasses.dataclass(frozen=True)
class BoardTable:
    """Renders a board; a rich renderable.

    Attributes:
      board: what is shown.
      steps: how many there will be, or None.
      title: stands in front of the first line.
      height: lines that there is room for; terms that pull the least give way. None: all are shown.
    """

    board: Board
    steps: int | None = None
    title: str = ""
    height: int | None = None
    aside: str = ""  # stands behind it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs, width = Signs.of(options.encoding), options.max_width
        parts: list[Text | Table] = [self._headline(signs, width, options.encoding)]
        if self.board.last is not None:
            parts += [Text(), self._terms(signs, width, options.encoding)]
            parts += self._footer(signs, width, options.encoding)
        yield Group(*parts)

    def _headline(self, signs: Signs, width: int, encoding: str) -> Text:
        """Where the run stands: as much of it as fits."""
        board = self.board
        parts = [Text(written(self.title, encoding), "bold")] if self.title else []
        if board.step is not None:
            parts.append(Text(f"step {board.step:,}", "bold"))
        if self.steps and board.step is not None:
            done = min(1.0, max(0.0, (board.step + 1) / self.steps))
            parts.append(progress(done, max(10, min(40, width - 60)), signs) + f" {done:.0%}")
        pace = board.pace
        if not math.isnan(pace):
            parts.append(Text(f"{pace:.3g} steps/s" if pace >= 0.1 else f"{1 / pace:.3g} s/step"))
            left = (self.steps or 0) - (board.step or 0) - 1
            if left > 0:
                parts.append(Text(f"{clock(left / pace)} left", DIM))
        if self.aside:
            parts.append(Text(written(self.aside, encoding), DIM))
        line = Text(no_wrap=True)
        for part in parts:
            if line and line.cell_len + 3 + part.cell_len > width:
                continue
            line.append_text(Text(signs.gap if line else "", DIM)).append_text(part)
        return cut(line, width, signs)

    def _terms(self, signs: Signs, width: int, encoding: str) -> Table:
        rows = self.board.rows()
        columns = _fitting(width, rows)
        shown, left_out = self._room_for(rows)
        # The name takes what the other columns leave, as much as the longest needs.
        spare = width - sum(column.width + 2 for column in columns)
        names = {row.name: written(row.name, encoding) for row in rows}
        longest = max(map(cell_len, (*names.values(), "base loss")))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style=DIM)
        table.add_column("term", width=max(4, min(longest, spare)), no_wrap=True)
        for column in columns:
            heading = Text(column.heading.replace("NORM", signs.norm))
            table.add_column(heading, width=column.width, justify=column.justify, no_wrap=True)
        room = max(4, min(longest, spare))
        rule = [Text(signs.rule * room, DIM), *(Text(signs.rule * c.width, DIM) for c in columns)]
        table.add_row(*rule)
        for row in shown:
            name = "base loss" if row.name == BASE else names[row.name]
            style = BAD if row.broken else DIM if row.weight == 0 else ""
            table.add_row(
                cut(Text(name, style), room, signs),
                *(column.cell(row, signs, column.width) for column in columns),
            )
        if left_out:
            more = f"+ {left_out} more"
            table.add_row(cut(Text(more, DIM), room, signs))
        total = _total_row(self.board)
        cells = [column.cell(total, signs, column.width) for column in columns]
        for cell in cells:
            cell.stylize("bold")
        table.add_row(Text("total", "bold"), *cells)
        return table

    def _room_for(self, rows: list[Row]) -> tuple[list[Row], int]:
        """The rows that fit, in order; those that are broken or pull hard go before the others."""
        if self.height is None:
            return rows, 0
        pairs = len(self._pairs())
        below = min(NOTES, len(self.board.notes)) + pairs + bool(pairs)
        room = max(2, self.height - HEAD - FOOT - below)
        if len(rows) <= room:
            return rows, 0

        def importance(row: Row) -> tuple[bool, bool, float, float]:
            contribution = 0.0 if math.isnan(row.contribution) else abs(row.contribution)
            return row.name == BASE, row.broken, 0.0 if math.isnan(row.share) else row.share, contribution

        kept = {row.name for row in sorted(rows, key=importance, reverse=True)[: room - 1]}
        return [row for row in rows if row.name in kept], len(rows) - len(kept)

    def _pairs(self) -> list[Against]:
        return self.board.against()[:PAIRS]

    def _footer(self, signs: Signs, width: int, encoding: str) -> list[Text]:
        board = self.board
        pairs, lines = self._pairs(), []
        for pair in pairs:
            names = ("base loss" if name == BASE else name for name in (pair.first, pair.second))
            who = written(" and ".join(names), encoding)
            line = Text(f"{who} against each other: cosine {pair.cosine:.2f}  ", no_wrap=True)
            lines.append(cut(line.append_text(heat(pair.trend, HEAT, signs)), width, signs))
        if lines:
            lines.insert(0, Text())
        said = [
            (board.counts["warning"], "warning", WARN),
            (board.counts["error"], "exception", BAD),
            (board.nonfinite, "step not finite", BAD),
            (board.counts["compile"], "compile", DIM),
        ]
        counts = Text(no_wrap=True)
        for count, what, style in said:
            if count:
                many = what.replace("step", "steps") if "step" in what else what + "s"
                counts.append(signs.gap if counts else "", DIM)
                counts.append(f"{count:,} {what if count == 1 else many}", style)
        if counts:
            lines += [Text(), cut(counts, width, signs)]
        for note in board.notes:
            line = Text("! ", LEVELS[note.level], no_wrap=True)
            line.append("" if note.step is None else f"step {note.step:,}  ", DIM)
            lines.append(cut(line.append(written(note.text, encoding), "default"), width, signs))
        return lines


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Lines that were rendered before."""

    lines: list[list[Segment]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


@dataclasses.dataclass(frozen=True)
class Column:
    """How a row's cell is drawn, and how much room it takes."""

    heading: str
    width: int
    cell: Callable[[Row, Signs, int], Text]
    justify: Literal["left", "right"] = "right"


def _number_column(heading: str, key: str) -> Column:
    def cell(row: Row, signs: Signs, width: int) -> Text:
        value = getattr(row, key)
        if math.isnan(value):
            if row.name == "" and not (row.broken and key == "contribution"):
                return Text()  # the total has no value and no weight of its own
            return Text(signs.broken if row.broken else signs.missing, BAD if row.broken else DIM)
        return Text(f"{value:.4g}", DIM if row.weight == 0 else "")

    return Column(heading, 10, cell)


def _share_cell(row: Row, signs: Signs, width: int) -> Text:
    if math.isnan(row.share):
        return Text("" if row.name == "" else signs.missing, DIM)
    percent = " <1%" if 0 < row.share < 0.005 else f"{row.share:4.0%}"
    if width <= len(percent):
        return Text(percent)
    return Text(f"{percent} ") + bar(row.share, width - len(percent) - 1, signs)


def _trend_cell(row: Row, signs: Signs, width: int) -> Text:
    return sparkline(row.trend, width, signs)


def _host_cell(row: Row, signs: Signs, width: int) -> Text:
    return cut(Text(row.host, WARN if row.host.startswith("skipped") else DIM), width, signs)


VALUE, WEIGHT = _number_column("value", "value"), _number_column("weight", "weight")
CONTRIBUTION, NORM = _number_column("contrib.", "contribution"), _number_column("NORM", "norm")


def _share(width: int) -> Column:
    return Column("grad share" if width > 9 else "grad", width, _share_cell, "left")


def _trend(width: int) -> Column:
    return Column("trend", width, _trend_cell, "left")


def _fitting(width: int, rows: Sequence[Row]) -> list[Column]:
    """The columns that leave room for a name; the first to go are those that others imply."""
    hosted = [cell_len(row.host) for row in rows if row.host]
    host = [Column("host", min(24, max(hosted)), _host_cell, "left")] if hosted else []
    norms = any(not math.isnan(row.norm) for row in rows)
    norm, wide, small = ([NORM], [_share(16)], [_share(11)]) if norms else ([], [], [])
    least = [_share(4)] if norms else []
    choices = [
        [VALUE, WEIGHT, CONTRIBUTION, *norm, *wide, _trend(20), *host],
        [VALUE, WEIGHT, CONTRIBUTION, *wide, _trend(16), *host],
        [VALUE, WEIGHT, CONTRIBUTION, *small, _trend(10), *host],
        [WEIGHT, CONTRIBUTION, *small, _trend(10), *host],
        [CONTRIBUTION, *small, _trend(8), *host],
        [WEIGHT, CONTRIBUTION, *small, _trend(10)],
        [CONTRIBUTION, *small, _trend(8)],
        [CONTRIBUTION, *least, _trend(8)],
        [CONTRIBUTION, *least],
    ]
    longest = max((cell_len(row.name) for row in rows), default=0)
    want = min(max(longest, 9), 16)
    for columns in choices:
        if sum(column.width + 2 for column in columns) + want <= width:
            return columns
    return choices[-1]


def _total_row(board: Board) -> Row:
    nan, broken = math.nan, bool(board.last and board.last.nonfinite)
    loss, norm = board.total("loss/total"), board.total("grad_norm/total")
    return Row("", nan, nan, loss, norm, nan, board.total_trend(), "", broken)


def progress(done: float, width: int, signs: Signs) -> Text:
    """A bar for the share of the run that is done."""
    full = round(done * width)
    return Text(signs.full * full, BAR) + Text(signs.empty * (width - full), DIM)


def bar(share: float, width: int, signs: Signs) -> Text:
    """A bar for a share, fine to a fraction of a character.

    Example:
      >>> bar(0.5, 3, Signs()).plain, bar(0.5, 4, Signs.of("ascii")).plain
      ('█▌ ', '##  ')
    """
    parts = len(signs.eighths)
    whole, rest = divmod(round(min(1.0, max(0.0, share)) * width * parts), parts)
    drawn = signs.eighths[-1] * whole + (signs.eighths[rest - 1] if rest else "")
    return Text(drawn + " " * (width - len(drawn)), BAR)


def sparkline(values: Sequence[float], width: int, signs: Signs) -> Text:
    """The values from left to right, between their least and their greatest.

    Example:
      >>> sparkline([0.0, 1.0, math.nan, 2.0], 9, Signs()).plain, sparkline([3.0, 3.0], 9, Signs()).plain
      ('▁▄×█', '▁▁')
    """
    means = buckets(values, width)
    numbers = [v for v in means if not math.isnan(v)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    steps, line = len(signs.trend) - 1, Text()
    # What float32 rounds away is no trend.
    span = high - low if high - low > 1e-6 * max(abs(low), abs(high)) else 0.0
    for value in means:
        if math.isnan(value):
            line.append(signs.broken, BAD)
        else:
            line.append(signs.trend[math.ceil((value - low) / span * steps - 0.5) if span else 0], BAR)
    return line


def heat(cosines: Sequence[float], width: int, signs: Signs) -> Text:
    """Cosines from left to right: red where they are below 0, and the fuller the nearer to -1 or 1.

    Example:
      >>> heat([-1.0, -0.5, 0.0, 1.0], 4, Signs()).plain
      '█▒·█'
    """
    strip = Text()
    for value in buckets(cosines, width):
        if math.isnan(value):
            strip.append(" ")
        else:
            sign = signs.heat[round(min(1.0, abs(value)) * (len(signs.heat) - 1))]
            strip.append(sign, BAD if value < 0 else BAR)
    return strip


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
      >>> clock(75), clock(7384)
      ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cut(text: Text, width: int, signs: Signs) -> Text:
    """The text, shortened to the width with a sign that it is."""
    if text.cell_len <= width:
        return text
    text = text.copy()
    text.truncate(max(0, width - 1))
    return text.append(signs.cut, DIM)


def written(text: str, encoding: str) -> str:
    """What a file or a program calls something, safe to write: one line, no control characters, and only
    what the encoding has.

    Example:
      >>> written("a" + chr(27) + "[31m\u2013b", "ascii")
      'a?[31m?b'
    """
    clean = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return clean.encode(encoding, "replace").decode(encoding)
