"""Pictures: everything is seen, whatever lies over it; names can be told apart; runs share their axes."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_cases import decay, line, note, term, write

from jaxreg.watching import gallery
from jaxreg.watching.artists import pattern
from jaxreg.watching.charts import marks
from jaxreg.watching.names import shortened
from jaxreg.watching.night import inks_of, repainted, rgb
from jaxreg.watching.run import read_run
from jaxreg.watching.scales import Scale, ticks
from jaxreg.watching.style import DARK, LIGHT

pytest.importorskip("matplotlib")
from matplotlib.text import Text
from PIL import Image

from jaxreg.watching.plots import DPI, Drawing, plot

NAMES = st.text(st.sampled_from("abc_"), min_size=1, max_size=70)


def run_of(tmp_path, *lines, name="run"):
    return read_run(write(tmp_path / f"{name}.jsonl", *lines))


def charts_of(*runs):
    return {chart.name: chart for chart in gallery.gallery(runs)}


def drawn(chart):
    return Drawing(chart).figure


def legend_of(figure):
    return [artist for artist in figure.artists if isinstance(artist, Text)]


def test_runs_side_by_side_have_the_same_axes(tmp_path):
    runs = [run_of(tmp_path, *decay(n, ["kl"], seed=n), name=str(n)) for n in (20, 50)]
    charts = charts_of(*runs)
    for name in ("contributions", "gradient-norms", "gradient-share", "weights", "values"):
        left, right = drawn(charts[name]).axes
        assert left.get_xlim() == right.get_xlim()
        assert left.get_ylim() == right.get_ylim()
        assert left.get_yscale() == right.get_yscale()
        assert left.get_xlim()[1] >= 49


def test_runs_are_drawn_over_one_another_in_total_and_term_by_term(tmp_path):
    runs = [run_of(tmp_path, *decay(n, ["kl", "l2"], seed=n), name=str(n)) for n in (20, 50)]
    charts = charts_of(*runs)
    (panel,) = charts["loss"].panels
    assert [line.label for line in panel.lines] == [
        "total, 20.jsonl", "base loss, 20.jsonl", "total, 50.jsonl", "base loss, 50.jsonl",
    ]  # fmt: skip
    assert [(p.title, [len(line.x) for line in p.lines]) for p in charts["compared"].panels] == [
        ("base loss", [20, 50]), ("kl", [20, 50]), ("l2", [20, 50]),
    ]  # fmt: skip
    ends = {axes.get_xlim() for axes in drawn(charts["compared"]).axes}
    assert len(ends) == 1


def test_shares_are_stacked_to_the_whole(tmp_path):
    run = run_of(tmp_path, *decay(30, [f"t{i}" for i in range(16)]))
    (axes,) = drawn(charts_of(run)["gradient-share"]).axes
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in axes.collections]
    assert tops == sorted(tops)
    assert tops[-1] == pytest.approx(100)
    assert len(tops) == 12  # the base loss, ten terms, the others
    np.testing.assert_allclose(sum(run.share(n) for n in ("base_loss", *run.terms)), 1)
    np.testing.assert_array_equal(run.share("t3"), run.shares()["t3"])


def test_marks_stand_where_something_happened(tmp_path):
    steps = [line(i, term("kl", value=None if i == 5 else 1.0)) for i in range(10)]
    events = [note(3, message="w"), note(7, "regularizer.compute.exception", term="kl", error="E"), note(99)]
    plain = run_of(tmp_path, *(line(i, term("kl")) for i in range(10)), name="a")
    marked = run_of(tmp_path, *steps, *events, name="b")
    assert marks(marked) == {"warning": [3], "error": [7], "nonfinite": [5]}
    assert marks(plain) == {}
    figure = drawn(charts_of(marked)["loss"])
    signs = [m for m in figure.axes[0].lines if m.get_marker() in "vx"]
    assert sorted(m.get_xdata()[0] for m in signs) == [3, 5, 7]
    named = [{text.get_text() for text in legend_of(f)} for f in (figure, drawn(charts_of(plain)["loss"]))]
    assert named[0] - named[1] == {"exception", "warning", "not finite"}


@pytest.mark.parametrize("count", [1, 2, 7, 25, 60])
@pytest.mark.parametrize("long", [False, True])
def test_legends_stay_inside_and_name_every_line_differently(tmp_path, count, long):
    names = [f"t{i}" for i in range(count)]
    if long:  # 60 characters, and what tells them apart in front, in the middle or at the end
        names = [f"{i:02d}".join(parts) for i, parts in enumerate(
            ([("", "_" * 58), ("middle" * 5, "x" * 28), ("e" * 58, "")] * 20)[:count])]  # fmt: skip
    run = run_of(tmp_path, *decay(3, names))
    chart = charts_of(run)["contributions"]
    drawing = Drawing(chart)
    day, night = drawing.pngs()
    figure = drawing.figure
    canvas = figure.canvas.get_renderer()
    box = figure.bbox
    labels = legend_of(figure)
    for text in labels:
        extent = text.get_window_extent(canvas)
        assert extent.x0 >= box.x0
        assert extent.x1 <= box.x1
        assert extent.y0 >= box.y0
        assert extent.y1 <= figure.axes[0].get_window_extent(canvas).y0
    shown = [text.get_text() for text in labels[: count + 1]]
    assert len(set(shown)) == count + 1
    width, height = figure.get_size_inches() * DPI
    for png in (day, night):
        assert Image.open(io.BytesIO(png)).size == (int(width), int(height))


@given(st.lists(NAMES, min_size=1, max_size=12, unique=True), st.integers(12, 40))
def test_shortened_names_are_short_and_differ(names, longest):
    short = shortened(names, longest)
    assert max(map(len, short)) <= longest
    assert [a == b for a, b in zip(names, short, strict=True)] == [len(name) <= longest for name in names]
    assert len(set(short) | {n for n in names if len(n) <= longest}) == len(names)


@pytest.mark.parametrize("apart", [0, 20, 58])
def test_what_tells_names_apart_is_not_cut_away(apart):
    names = ["x" * apart + f"{i:02d}" + "y" * (58 - apart) for i in range(40)]
    assert all(f"{i:02d}" in name for i, name in enumerate(shortened(names, 20)))


def test_equal_weights_are_drawn_in_turns_and_named(tmp_path):
    run = run_of(
        tmp_path, *(line(i, term("a"), term("b", weight=3.0), term("c"), term("d")) for i in range(30))
    )
    chart = charts_of(run)["weights"]
    assert [line.turn for line in chart.panels[0].lines] == [(0, 3), (0, 1), (1, 3), (2, 3)]
    assert chart.notes == ("equal, and drawn in turns: a, c, d.",)
    # The strokes of equal lines fill the line, and none lies over another.
    covered = []
    for turn in range(3):
        offset, (stroke, gap) = pattern(0, (turn, 3))
        assert math.isclose(stroke + gap, 3 * stroke)
        covered.append((-offset) % (stroke + gap) / stroke)
    assert covered == [0, 1, 2]


def test_a_gradient_of_exactly_zero_is_said_to_be_zero(tmp_path):
    steps = [
        line(i, term("frozen", norm=0.0), term("half", norm=float(i % 2)), term("far", norm=1e3))
        for i in range(10)
    ]
    chart = charts_of(run_of(tmp_path, *steps))["gradient-norms"]
    assert chart.scale.kind == "log"
    assert chart.notes == (
        "exactly 0 throughout, for which this scale has no place: frozen.",
        "exactly 0 in some steps, where the line is broken: half (in 5 of 10).",
    )
    (axes,) = drawn(chart).axes
    heights = np.concatenate([line.get_ydata() for line in axes.lines])
    assert np.nanmin(heights[np.isfinite(heights)]) >= 0.5  # nothing stands for 0
    assert axes.get_ylim()[0] > 1e-2


def test_zero_has_a_place_where_the_scale_has_one(tmp_path):
    steps = [
        line(i, term("off", weight=0.0), term("small", value=1e-3), term("large", value=1e3))
        for i in range(9)
    ]
    chart = charts_of(run_of(tmp_path, *steps))["contributions"]
    assert chart.scale.kind == "symlog"
    (axes,) = drawn(chart).axes
    low, _ = axes.get_ylim()
    assert -1e-3 < low < 0  # no room is wasted on numbers that there are not
    assert 0.0 in axes.get_yticks()


@given(st.floats(1e-30, 1e30), st.floats(1.001, 1e12), st.booleans(), st.integers(3, 9))
def test_ticks_lie_between_the_ends_and_are_few(low, ratio, symmetric, most):
    high = low * ratio
    scale = Scale("symlog", low, True) if symmetric else Scale("log", low)
    at = ticks(scale, -high if symmetric else low, high, most)
    assert at == sorted(set(at))
    assert len(at) <= most + 1
    assert all(0.999 * low <= abs(value) <= high or (symmetric and value == 0) for value in at)


@pytest.mark.parametrize(
    "lines",
    [
        [line(0)],
        [line(7, term("a"), norm=None)],
        [line(i, term("a", value=None, norm=None), base=None) for i in range(3)],
        [line(i, term("a", value=-(10.0**i)), term("b", value=1e-9)) for i in range(3)],
        [line(i, term("a", weight=0.0)) for i in range(2)],
    ],
    ids=["one step", "no norms", "nothing finite", "negative", "weight 0"],
)
def test_whatever_a_run_holds_it_is_drawn(tmp_path, lines):
    path = write(tmp_path / "run.jsonl", *lines)
    for chart in gallery.gallery([read_run(path)]):
        assert all(len(png) > 500 for png in Drawing(chart).pngs())
    assert plot(path, tmp_path / "terms.png").stat().st_size > 500


def test_by_night_every_colour_is_the_night_themes():
    inks = np.array([rgb(color) for color in (LIGHT.paper, *inks_of(LIGHT))], np.uint8)
    want = np.array([rgb(color) for color in (DARK.paper, *inks_of(DARK))], int)
    got = repainted(inks, LIGHT, DARK).astype(int)
    same = [
        i for i, color in enumerate(inks_of(LIGHT), 1) if color != LIGHT.base
    ]  # the base loss is ink by day
    np.testing.assert_array_equal(got[[0, *same]], want[[0, *same]])
    np.testing.assert_array_equal(repainted(inks, LIGHT, LIGHT), inks)
    half = (inks[0].astype(int) + inks[same[0]]) // 2
    between = repainted(half[None].astype(np.uint8), LIGHT, DARK).astype(int)[0]
    np.testing.assert_allclose(between, (want[0] + want[same[0]]) / 2, atol=2)
