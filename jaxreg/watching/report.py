"""A run as one HTML page that needs nothing else, and the pictures beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxreg.watching.gallery import gallery
from jaxreg.watching.page import Page
from jaxreg.watching.plots import pictures
from jaxreg.watching.run import read_run

MOST_RUNS = 4


def report(
    path: str | os.PathLike[str],
    *more: str | os.PathLike[str],
    out: str | os.PathLike[str] = "report",
    title: str | None = None,
) -> Path:
    """Write ``report.html`` and its pictures (PNG) into a folder.

    The page holds all that it needs: no network, and where no script may run, pictures stand in place of the
    charts that one can point at and zoom. More than one run stand side by side, with the same axes, and term
    by term over one another; they are compared with the first over the last tenth of the steps that both
    have.

    Args:
      path: a run's JSONL file.
      more: runs to compare with it, up to three.
      out: the folder; it is made.
      title: the page's title; the file's name and its folder's by default.

    Returns:
      The page's path.

    Raises:
      ImportError: matplotlib is missing; the extra ``plot`` brings it.
      OSError: a file cannot be read, or the folder cannot be written.
      ValueError: a file holds no step, or there are too many.

    Example:
      >>> import tempfile
      >>> line = '{"step": 5, "loss_total": 2.5, "base_loss": {"value": 2.5}, "regularizers": {}}'
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = Path(folder, "run.jsonl").write_text(line)
      ...     page = report(Path(folder, "run.jsonl"), out=folder)
      ...     sorted(file.name for file in Path(folder).iterdir())
      ['contributions.png', 'loss.png', 'report.html', 'run.jsonl']
    """
    paths = [Path(p) for p in (path, *more)]
    if len(paths) > MOST_RUNS:
        raise ValueError(f"a report compares at most {MOST_RUNS} runs, not {len(paths)}")
    runs = [read_run(p) for p in paths]
    for run, name in zip(runs, told_apart(paths), strict=True):
        run.name = name
    charts = gallery(runs)
    drawn = pictures(charts)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (light, _) in drawn.items():
        (folder / f"{name}.png").write_bytes(light)
    page = folder / "report.html"
    text = Page(runs, charts, drawn, title or " and ".join(run.name for run in runs)).html()
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def told_apart(paths: Sequence[Path]) -> list[str]:
    """The runs' names: as much of their paths as tells one from another, of one run its folder, too.

    Example:
      >>> told_apart([Path("runs/a/run.jsonl"), Path("runs/b/run.jsonl")]), told_apart([Path("a/run.jsonl")])
      (['a/run', 'b/run'], ['a/run'])
    """
    parts = [p.absolute().with_suffix("").parts for p in paths]
    if len(parts) == 1:
        return ["/".join(part for part in parts[0][-2:] if part != "/")]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({i})" for i, part in enumerate(parts, 1)]  # a run compared with itself
