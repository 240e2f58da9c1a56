"""Something to look at: a live table of the terms while training, and a picture afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class TermsTable:
    """A progress bar above a table of the terms; a plain table now and then without a terminal."""

    def __init__(self, steps: int) -> None:
        self._console = Console()
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("train", total=steps)
        self._live = Live(self._progress, console=self._console, refresh_per_second=4)
        self._every = max(1, steps // 10)
        self._steps = steps

    def __enter__(self) -> TermsTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, step: int, report: dict[str, Any]) -> None:
        """Show one step's ``to_dict()``."""
        self._progress.update(self._task, completed=step + 1)
        if self._console.is_terminal:
            self._live.update(Group(self._progress, terms_table(report)))
        elif step % self._every == 0 or step == self._steps - 1:
            self._console.print(f"step {step + 1}/{self._steps}")
            self._console.print(terms_table(report))


def terms_table(report: dict[str, Any]) -> Table:
    """One row a term: what it is worth, what it weighs, and how hard it pulls."""
    table = Table(box=None, pad_edge=False)
    table.add_column("term")
    for heading in ("value", "weight", "contribution", "grad norm", "weighted"):
        table.add_column(heading, justify="right")
    base = report["base_loss"]
    table.add_row("base loss", *map(shown, (base["value"], 1.0, base["value"], *[base["grad_norm"]] * 2)))
    for name, term in report["regularizers"].items():
        keys = ("value", "weight", "contribution", "grad_norm", "grad_norm_weighted")
        table.add_row(name, *(shown(term[key]) for key in keys), style="dim" if not term["weight"] else None)
    total = report["total_grad_norm"]
    table.add_row("total", "", "", shown(report["loss_total"]), "", shown(total), style="bold")
    return table


def shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def plot_run(log: Path, picture: Path) -> None:
    """Each term's contribution and weighted gradient norm over the run, from its JSONL file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [json.loads(line) for line in log.read_text().splitlines()]
    at = [s["step"] for s in steps]
    names = list(steps[0]["regularizers"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colours = dict(zip(["base loss", *names], plt.get_cmap("tab10").colors, strict=False))

    def series(name: str, key: str, base_key: str) -> list[float]:
        if name == "base loss":
            return [s["base_loss"][base_key] for s in steps]
        return [s["regularizers"][name][key] for s in steps]

    for axes, key, base_key, title in (
        (left, "contribution", "value", "contribution to the loss (weight · value)"),
        (right, "grad_norm_weighted", "grad_norm", "norm of its gradient (weight · ‖∇value‖)"),
    ):
        for name in ("base loss", *names):
            axes.plot(at, smooth(series(name, key, base_key)), label=name, color=colours[name], lw=1.6)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("symlog", linthresh=1e-2)
    right.set_yscale("log")
    left.axhline(0, color="black", lw=0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float | None], keep: float = 0.9) -> list[float]:
    """An exponential moving average that passes over what is missing or zero."""
    result, mean = [], None
    for value in values:
        if value:
            mean = value if mean is None else keep * mean + (1 - keep) * value
        result.append(mean if value and mean is not None else float("nan"))
    return result
