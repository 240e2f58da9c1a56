"""The report's strips of cosines, and the warning of a pair that always conflicts."""

import io
import json

import numpy as np
import pytest

import jaxreg as jr
from jaxreg.watching.board import Board
from jaxreg.watching.conflicts import conflicts, pairs, strip
from jaxreg.watching.records import parse
from jaxreg.watching.report import report
from jaxreg.watching.run import read_run
from jaxreg.watching.words import percent


def write(path, steps=60):
    with path.open("w") as file:
        for step in range(steps):
            term = dict(value=1.0, weight=1.0, contribution=1.0, custom={})
            cosines = {
                "base_loss": {"kl": -0.5, "l2<b>": 0.9 - step / 40},
                "kl": {"l2<b>": None if step < 9 else 0.1},
            }
            terms = {"kl": term, "l2<b>": term}
            line = dict(
                step=step, loss_total=3.0, base_loss={"value": 1.0}, regularizers=terms, cosines=cosines
            )
            file.write(json.dumps(line) + "\n")
    return path


def test_pairs_come_with_those_that_conflict_most_first(tmp_path):
    run = read_run(write(tmp_path / "run.jsonl"))
    found = pairs(run)
    assert [(pair.first, pair.second) for pair in found] == [
        ("base_loss", "kl"), ("base_loss", "l2<b>"), ("kl", "l2<b>"),
    ]  # fmt: skip
    assert found[0].conflicts == 1.0
    assert found[1].conflicts == pytest.approx(np.mean(0.9 - np.arange(60) / 40 < 0))
    assert found[2].conflicts == 0.0


def test_the_page_has_them_and_no_markup_of_the_names(tmp_path):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "run.jsonl")
    page = report(path, out=tmp_path / "out").read_text()
    assert "Which terms pull against each other" in page
    assert page.count('class="heat"') == 3
    assert "l2&lt;b&gt;" in page
    assert "<b>" not in page
    (section,) = conflicts([read_run(path)])
    assert f"<td>{percent(1.0)}</td>" in section


def test_a_run_without_cosines_has_no_such_section(tmp_path):
    line = dict(step=0, loss_total=1.0, base_loss={"value": 1.0}, regularizers={})
    (tmp_path / "run.jsonl").write_text(json.dumps(line))
    assert conflicts([read_run(tmp_path / "run.jsonl")]) == []


def drawn(board, **rest):
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    from jaxreg.watching.table import BoardTable

    console.print(BoardTable(board, **rest))
    return console.file.getvalue()


def test_a_table_has_the_pairs_that_pull_against_each_other_now(tmp_path):
    board = Board()
    for line in write(tmp_path / "run.jsonl").read_bytes().splitlines()[:20]:
        board.take(parse(line))
    assert [(pair.first, pair.second) for pair in board.against()] == [("base_loss", "kl")]
    assert "base loss and kl against each other: cosine -0.50" in drawn(board)
    for line in write(tmp_path / "again.jsonl").read_bytes().splitlines()[20:]:
        board.take(parse(line))
    assert [pair.second for pair in board.against()] == ["l2<b>", "kl"]
    said = drawn(board, height=12)  # the terms give way, the pairs stay
    assert said.count("against each other") == 2
    assert len(said.splitlines()) <= 12


def test_a_strip_is_red_below_0_and_blue_above():
    drawn = strip(np.array([-1.0, 0.5, np.nan]))
    assert drawn.count("<rect") == 2
    assert drawn.index("#c0392b") < drawn.index("#2e6fba")
    assert 'fill-opacity="0.50"' in drawn
    assert strip(np.linspace(-1, 1, 1000)).count("<rect") == 48


def test_a_pair_that_always_conflicts_is_warned_of_once():
    told = []
    x = np.array([-1.0, -1.0], np.float32)
    l2 = dict(name="l2", fn=lambda x, batch: (x**2).sum() / 2, weight=1.0)
    objective = jr.compose(lambda x, batch: x.sum(), [l2], track_grad_norms=jr.GradNorms(gramian=True))
    (_, out), _ = objective.value_and_grad(x)
    warn = jr.telemetry.Warnings(conflict_steps=3)
    with jr.telemetry.attached(
        warn, lambda e: told.append(e.metadata["message"]) if e.name == "warning" else None
    ):
        for step in range(8):
            jr.telemetry.log(out, step=step)
    (message,) = told
    assert message.startswith(
        "the base loss and term 'l2' have pulled against each other for 3 steps, cosine -1.00"
    )
    assert "UPGrad" in message
    with pytest.raises(ValueError, match="cosine is between -1 and 0"):
        jr.telemetry.Warnings(cosine=0.5)
