"""The live table: what it shows, in every width, and that it never harms the loop."""

import io
import json
import os
import re
import sys
import threading
import time
import types

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_cases import decay, line, note, term, write

import jaxreg as jr
from jaxreg import __main__
from jaxreg.base import events as _events
from jaxreg.watching import console as live
from jaxreg.watching import screen
from jaxreg.watching.board import Board, buckets
from jaxreg.watching.console import LiveTable, watch
from jaxreg.watching.records import parse

rich = pytest.importorskip("rich")
from rich.cells import cell_len  # noqa: E402
from rich.console import Console  # noqa: E402

from jaxreg.watching.table import BoardTable, Signs, sparkline  # noqa: E402

NAMES = ["kl", "entropy_bonus", "a_name_that_is_much_longer_than_the_others", "l2", "漢字の名前"]
HOST = {"host_seconds": 0.52, "host_age": 3.0, "host_trains": 0.0}


def board_of(*objects):
    board = Board()
    for o in objects:
        board.take(parse(json.dumps(o).encode()))
    return board


def drawn(board, width=120, *, encoding="utf-8", **more):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None)
    console.print(BoardTable(board, **more))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def terminal(width=100, height=40):
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=True,
        color_system="truecolor",
        _environ={"TERM": "xterm-256color"},
    )


def stream_console(width=100):
    return Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)


def step_of(value=1.0, **weights):
    terms = [
        dict(name=n, fn=lambda x, b: jnp.sum(x**2), weight=w) for n, w in (weights or {"l2": 0.5}).items()
    ]
    return jr.compose(lambda x, b: jnp.sum(x), terms)(jnp.full(2, value))[1]


def test_a_row_says_what_its_term_did():
    board = board_of(line(0, term("kl", value=4.0, weight=0.5, norm=6.0), norm=1.0))
    lines = drawn(board).splitlines()
    row = next(text for text in lines if text.startswith("kl"))
    assert row.split()[:5] == ["kl", "4", "0.5", "2", "3"]
    assert "75%" in row
    assert "25%" in next(text for text in lines if text.startswith("base loss"))
    total = next(text for text in lines if text.startswith("total"))
    assert total.split()[:3] == ["total", "4", "1.5"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width, encoding):
    steps = [line(i, *(term(n, value=-1e-5 / (i + 1), **HOST) for n in NAMES)) for i in range(9)]
    warning = note(8, message="a long warning, " * 30, term="kl")
    text = drawn(board_of(*steps, warning), width, encoding=encoding, steps=10, title="run.jsonl")
    lines = [row.rstrip() for row in text.splitlines()]
    assert all(cell_len(row) <= width for row in lines)
    for begins in ("base loss", "kl", "total"):
        assert sum(row.startswith(begins) for row in lines) == 1  # none is wrapped
    # At any width the contribution is there.
    assert all("-5.556e-07" in row for row in lines if row.startswith("kl"))
    assert text.isascii() or encoding == "utf-8"


def test_host_terms_say_their_seconds_their_age_and_that_they_do_not_train():
    text = drawn(board_of(line(0, term("judge", **HOST), term("b", host_seconds=0.0, host_age=-1.0))))
    assert "0.52 s, 3 old, no grad" in text
    assert "skipped" in text
    assert "host" not in drawn(board_of(line(0, term("kl"))))


def test_norms_that_are_not_tracked_take_no_room():
    text = drawn(board_of(line(0, term("kl", norm=None), norm=None)))
    assert "share" not in text
    assert "grad" not in text


def test_what_is_not_finite_is_marked_and_counted():
    text = drawn(board_of(line(0, term("kl")), line(1, term("kl", value=None, norm=None))))
    assert "×" in next(row for row in text.splitlines() if row.startswith("kl"))
    assert "1 step not finite" in text


def test_notes_are_shown_last_first_counted_and_never_markup():
    notes = [note(i, message=f"[bold]message {i}[/bold]\x1b[31m", term="kl") for i in range(9)]
    text = drawn(board_of(line(9), *notes, note(9, "custom_loss.exception", error="E"), note(9, "compile")))
    assert "9 warnings · 1 exception · 1 compile" in text
    assert "[bold]message 8[/bold]?[31m" in text
    assert "message 5" not in text
    assert "\x1b" not in text


def test_a_low_terminal_shows_the_terms_that_pull_and_the_broken_ones():
    terms = [term(f"t{i}", norm=float(i + 1)) for i in range(20)]
    terms[3] = term("t3", value=None)
    text = drawn(board_of(line(0, *terms)), height=15)
    assert len(text.splitlines()) <= 15
    assert "+ 14 more" in text
    shown = [row.split()[0] for row in text.splitlines() if row.startswith("t") and row[1].isdigit()]
    assert shown == ["t3", "t14", "t15", "t16", "t17", "t18", "t19"] or shown[0] == "t3"
    assert "t19" not in drawn(board_of(line(0, *terms[:4])), height=15)


def test_the_trend_is_that_of_the_recent_steps_and_forgets_what_is_superseded():
    board = board_of(*(line(i, base=float(i)) for i in range(10)), line(4, base=0.0))
    assert board.rows()[0].trend == (0.0, 1.0, 2.0, 3.0, 0.0)
    assert board.step == 4


@given(st.lists(st.floats(-1e300, 1e300) | st.just(float("nan")), max_size=50), st.integers(1, 30))
def test_a_sparkline_is_never_longer_than_its_room(values, width):
    for signs in (Signs(), Signs.of("ascii")):
        text = sparkline(values, width, signs).plain
        assert len(text) == min(width, len(values))
        assert set(text) <= {*signs.trend, signs.broken}
    assert len(buckets(values, width)) == min(width, len(values))


def test_without_a_terminal_about_ten_tables_are_printed_and_the_last_step_is_in():
    console, out = stream_console(), step_of()
    with LiveTable(steps=100, console=console):
        for i in range(100):
            jr.telemetry.log(out, step=i)
    text = console.file.getvalue()
    assert 10 <= text.count("base loss") <= 12
    assert "step 99 " in text
    assert "\x1b" not in text


def test_without_a_terminal_or_a_length_it_prints_ever_more_rarely():
    rarely = live._Rarely(None)
    assert [i for i in range(1, 3000) if rarely.now(i)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    rarely = live._Rarely(3)
    assert [i for i in range(1, 4) if rarely.now(i)] == [1, 2, 3]


def test_in_a_terminal_the_table_stays_in_place_and_the_last_step_is_left_standing():
    console = terminal()
    with LiveTable(steps=3, console=console, refresh=50):
        for i in range(3):
            jr.telemetry.log(step_of(), step=i, metrics={"x": 1.0})
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor hides and comes back
    assert "step 2" in text
    assert "100%" in text


def test_where_the_loop_raises_the_terminal_is_restored_and_the_handler_gone():
    console, table = terminal(), None
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with LiveTable(console=console) as table:
            jr.telemetry.log(step_of(), step=0)
            raise KeyboardInterrupt
    assert console.file.getvalue().count("\x1b[?25h") == 1
    assert all(entry.handler is not table for entry in _events._attached)
    jr.telemetry.log(step_of(), step=1)  # nobody listens, nothing is drawn
    assert "step 1" not in console.file.getvalue()


def test_a_stream_that_is_gone_does_not_end_the_run():
    console = terminal()
    with LiveTable(console=console):
        jr.telemetry.log(step_of(), step=0)
        console.file.close()
    with LiveTable(console=terminal()) as table, pytest.raises(ValueError, match="attached already"):
        jr.telemetry.attach(table)


def test_events_become_rows_and_notes():
    console = stream_console()
    with LiveTable(steps=1, console=console):
        jr.telemetry.emit("warning", step=0, metadata={"kind": "spike", "term": "l2", "message": "12 x"})
        jr.telemetry.emit(
            "custom_loss.exception", step=0, metadata={"error": ValueError("no"), "inputs": None}
        )
        jr.telemetry.emit(
            "compile", measurements={"duration": 1.0}, metadata={"program": "p", "changed": ("a",)}
        )
        jr.telemetry.emit("something.else")
        jr.telemetry.log(step_of(float("nan")), step=0)
    text = console.file.getvalue()
    assert "l2: 12 x" in text
    assert "ValueError: no" in text
    assert "1 step not finite" in text


def begins(program="train_step"):
    jr.telemetry.emit("compile.start", metadata={"program": program, "changed": [], "terms": ()})


def ends(program="train_step"):
    jr.telemetry.emit("compile", measurements={"duration": 2.0}, metadata={"program": program})


def test_a_stream_is_told_once_that_a_program_compiles():
    console, out = stream_console(), step_of()
    with LiveTable(steps=2, console=console):
        begins()
        assert console.file.getvalue() == "compiling train_step ...\n"  # before anything else
        ends()
        begins()  # once more, for another shape
        ends()
        begins("evaluate[bold]")
        jr.telemetry.log(out, step=0)
    text = console.file.getvalue()
    assert text.count("compiling train_step ...") == 1
    assert "compiling evaluate[bold] ..." in text
    assert "2 compiles" in text  # not of those that began


def test_a_terminal_shows_for_how_long_a_program_has_compiled():
    table = LiveTable(console=terminal())
    with table:
        begins()
        assert table._view()["aside"] == "compiling train_step ..."
        program, began = table._board.compiling
        table._board.compiling = program, began - 12
        assert table._view()["aside"] == "compiling train_step ... 12 s"
        text = drawn(**table._view())
        assert text.split() == ["compiling", "train_step", "...", "12", "s"]
        ends()
        assert table._view()["aside"] == ""
        begins()
        jr.telemetry.log(step_of(), step=0)  # of a program that failed to compile nothing more is heard
        assert table._view()["aside"] == ""


def test_the_loop_does_not_wait_while_the_table_is_drawn():
    table, out = LiveTable(console=terminal()), step_of()
    with table:
        with table._lock:  # as while it is drawn
            for i in range(3):
                jr.telemetry.log(out, step=i)
            assert table._board.count == 0
        jr.telemetry.log(out, step=3)
        assert table._board.count == 4


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is told to show and to update, in order: (output's number, its content)."""
    calls = []

    class Handle:
        def __init__(self, number):
            self.number = number

        def update(self, output):
            calls.append((self.number, output._repr_mimebundle_()))

    def display(output, *, display_id):
        assert display_id is True
        handle = Handle(len({number for number, _ in calls}))
        handle.update(output)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    return calls


def notebook():
    return Console(force_jupyter=True, file=io.StringIO(), width=90)


def test_a_notebook_has_one_table_that_is_updated(shown, monkeypatch):
    console, now = notebook(), [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with LiveTable(steps=40, console=console, refresh=4):
        begins()
        for i in range(40):
            jr.telemetry.log(step_of(kl=0.5), step=i)
            now[0] += 0.1
    assert {number for number, _ in shown} == {0}
    assert len(shown) == 15  # the first, one in three steps (0.25 s), the last
    first, last = shown[0][1], shown[-1][1]
    assert first["text/plain"].strip() == "compiling train_step ..."
    assert "step 39 " in last["text/plain"]
    assert "step 39 " in re.sub(r"<[^>]*>", "", last["text/html"])
    assert last["text/html"].startswith("<pre ")
    assert console.file.getvalue() == ""


def test_another_cell_gets_a_table_of_its_own_and_a_cell_without_a_step_none(shown):
    table = LiveTable(console=notebook())
    for i in range(2):
        with table:
            jr.telemetry.log(step_of(), step=i)
    assert {number for number, _ in shown} == {0, 1}
    count = len(shown)
    with LiveTable(console=notebook()):
        pass
    assert len(shown) == count


def test_in_a_notebook_drawing_takes_little_of_the_loops_time(shown, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    draw = screen._Notebook._draw

    def slow(self):
        draw(self)
        now[0] += 1.0  # seconds

    monkeypatch.setattr(screen._Notebook, "_draw", slow)
    with LiveTable(console=notebook()):
        for i in range(100):
            jr.telemetry.log(step_of(), step=i)
            now[0] += 0.5
    assert len(shown) == 4  # at 0, 21 and 42 s, and the end


def test_what_a_notebook_shows_is_no_markup(shown):
    with LiveTable(console=notebook()):
        jr.telemetry.log(step_of(**{"<b>&[red]": 0.5}), step=0)
    html = shown[-1][1]["text/html"]
    assert "&lt;b&gt;&amp;[red]" in html
    assert "<b>" not in html


def test_watch_in_a_notebook_updates_one_table(shown, tmp_path, monkeypatch):
    path = write(tmp_path / "run.jsonl", line(3, term("kl")))
    naps(monkeypatch, lambda: write(path, line(3, term("kl")), line(4, term("kl"))))
    watch(path, interval=0.01, console=notebook())
    assert {number for number, _ in shown} == {0}
    assert "step 4" in shown[-1][1]["text/plain"]


def test_many_threads_log_while_it_draws():
    console = terminal()
    out = step_of(kl=0.5, l2=0.1)
    with LiveTable(console=console, refresh=200) as table:

        def work():
            for i in range(50):
                jr.telemetry.log(out, step=i)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert table._board.count == 200


def test_without_rich_the_error_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r'needs rich: pip install "jaxreg\[console\]"'):
        LiveTable()
    assert __main__.main(["watch", str(tmp_path / "run.jsonl"), "--once"]) == 1
    assert 'pip install "jaxreg[console]"' in capsys.readouterr().err


def test_watch_once_prints_one_table(tmp_path, capsys):
    path = write(tmp_path / "run.jsonl", *decay(30, NAMES[:2]))
    with path.open("a") as file:
        file.write("garbage\n" + json.dumps(line(30, base=7.25)))  # no newline: whole all the same
    assert __main__.main(["watch", str(path), "--once"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("base loss") == 1
    assert "step 30" in printed
    assert "7.25" in printed
    assert "1 line skipped" in printed


def test_watch_says_what_is_wrong_on_one_line(tmp_path, capsys):
    assert __main__.main(["watch", str(tmp_path / "none.jsonl"), "--once"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none.jsonl: No such file" in error
    assert __main__.main(["watch", str(tmp_path)]) == 1  # a folder never becomes a run's file
    with pytest.raises(SystemExit):
        __main__.main(["watch", "x", "--interval", "0"])


def naps(monkeypatch, *between):
    """What happens while watch sleeps; at the end, Ctrl-C."""
    todo = list(between)

    def sleep(seconds):
        if not todo:
            raise KeyboardInterrupt
        todo.pop(0)()

    monkeypatch.setattr(live.time, "sleep", sleep)


def test_watch_says_what_it_waits_for(tmp_path):
    for name, text, want in (
        ("none.jsonl", None, "waiting for the file {}"),
        ("no/such/run.jsonl", None, "waiting for the file {} (there is no folder {parent} yet)"),
        ("empty.jsonl", "", "waiting for the first step in {}"),
        ("prose.txt", "a\nb\n", "waiting for the first step in {}: so far none of its 2 lines is one"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        console, path = stream_console(width=400), tmp_path / name
        watching = live._Watching(path, console, refresh=1)
        watching.look()
        watching.look()  # says it once
        assert console.file.getvalue().strip() == want.format(path, parent=path.parent)


@pytest.mark.parametrize("console", [terminal, stream_console])
def test_watch_waits_for_the_file_follows_it_and_ends_with_ctrl_c(tmp_path, monkeypatch, console):
    path, console = tmp_path / "run.jsonl", console()
    other = write(tmp_path / "other.jsonl", line(70, term("new")))
    naps(
        monkeypatch,
        lambda: path.write_text(""),
        lambda: write(path, line(3, term("kl"))),
        lambda: write(path, line(3, term("kl")), line(4, term("kl"))),
        path.unlink,
        lambda: os.replace(other, path),
        lambda: None,
    )
    watch(path, interval=0.01, console=console)
    text = console.file.getvalue()
    assert "step 70" in text
    if not console.is_terminal:
        assert "waiting for the file" in text
        assert "waiting for the first step" in text
        assert "step 3" in text
    else:
        assert text.count("\x1b[?25h") == 1


def test_watch_says_that_nothing_comes(tmp_path, monkeypatch):
    path, console = write(tmp_path / "run.jsonl", line(3)), terminal()
    watching = live._Watching(path, console, refresh=1)
    watching.look()
    later = time.monotonic() + 60
    monkeypatch.setattr(live.time, "monotonic", lambda: later)
    with watching:
        watching.look()
        assert "nothing new for 60 s" in watching._view()["aside"]
