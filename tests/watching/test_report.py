"""The page: whole, alone, escaped, small; the curves keep their spikes; runs are compared."""

import base64
import html.parser
import io
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from run_cases import decay, line, note, term, write

from jaxreg import __main__
from jaxreg.watching.curves import BUCKETS, thin
from jaxreg.watching.plots import plot
from jaxreg.watching.report import report, told_apart
from jaxreg.watching.run import read_run
from jaxreg.watching.style import DARK, DASHES, LIGHT, REST, TOTAL, Style
from jaxreg.watching.summary import summary
from jaxreg.watching.words import escaped

pytest.importorskip("matplotlib")
from matplotlib import pyplot
from PIL import Image

NASTY = [
    "</td><script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "$x^",
    "_hidden",
    "漢字",
    "\ud800\x00\x1b\n",
]
VOID = {"meta", "img", "source", "br", "link"}


class Page(html.parser.HTMLParser):
    """What a page holds; that its tags are closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.texts, self.scripts, self._open = [], [], [], []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def pictures(self):
        uris = [a["src"] for a in self.of("img")] + [a["srcset"] for a in self.of("source")]
        assert all(uri.startswith("data:image/png;base64,") for uri in uris)
        return [Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2], validate=True))) for u in uris]


def page_of(tmp_path, *files):
    return Page(report(*files, out=tmp_path / "out"))


def test_a_page_stands_alone_and_can_be_read_by_everyone(tmp_path):
    path = write(tmp_path / "run.jsonl", *decay(40, ["kl", "l2"], timings={"pack": 0.1}))
    page = page_of(tmp_path, path)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not page.of("link")
    assert all("src" not in script for script in page.of("script"))
    assert "url(" not in page.source
    assert page.source.startswith("<!doctype html>")
    assert page.of("html")[0]["lang"] == "en"
    assert any(m.get("name") == "viewport" for m in page.of("meta"))
    assert "prefers-color-scheme: dark" in page.source
    assert all(len(image["alt"]) > 30 for image in page.of("img"))
    assert "base loss 1.1" in page.of("img")[0]["alt"]
    assert all(cell["scope"] in ("col", "row") for cell in page.of("th"))
    assert len(page.of("h1")) == len(page.of("main")) == len(page.of("title")) == 1
    for picture in page.pictures:
        picture.load()
        assert picture.width > 800
    pngs = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert pngs == {"loss", "contributions", "gradient-share", "gradient-norms", "weights", "values",
                    "gradient-norms-unweighted", "timings"}  # fmt: skip
    assert len(page.pictures) == 2 * len(pngs)  # by day and by night


def test_what_is_not_there_is_left_out(tmp_path):
    path = write(tmp_path / "run.jsonl", line(0, term("kl", norm=None), norm=None))
    page = page_of(tmp_path, path)
    pngs = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert pngs == {"loss", "contributions", "weights", "values"}
    assert "Warnings" not in page.text
    assert "Compiled" not in page.text
    assert pyplot.get_fignums() == []  # nothing goes through the global state
    base_only = page_of(tmp_path / "b", write(tmp_path / "base.jsonl", line(5)))
    assert "base loss" in base_only.text


@pytest.mark.parametrize("runs", [1, 2])
def test_whatever_a_file_says_is_shown_and_never_run(tmp_path, runs):
    steps = [line(i, *(term(n) for n in NASTY)) for i in range(3)]
    notes = [note(1, message=n, term=n, kind=n) for n in NASTY]
    notes += [note(1, "compile", program=n, changed=[n]) for n in NASTY]
    names = ["<b>run&.jsonl", "plain.jsonl"][:runs]
    page = page_of(tmp_path, *(write(tmp_path / n, *steps, *notes) for n in names))
    assert len(page.of("script")) == len(page.scripts) == 3  # the page's own
    assert not {tag for tag, _ in page.tags} & {
        "iframe",
        "link",
        "a",
        "b",
        "object",
        "embed",
        "form",
    }
    assert len(page.of("img")) == len(page.of("picture"))  # none but the page's own
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    for name in NASTY[:5]:
        assert name in page.text
    assert "<b>run&" in page.text


@given(st.text())
def test_escaped_text_is_text(text):
    assert not set(escaped(text)) & set("<>\"'\0\x1b")
    assert len(escaped(text * 300, 10)) <= 10 * len("&quot;")


def test_ten_thousand_steps_of_twenty_terms_stay_small(tmp_path):
    names = [f"term_{i:02d}" for i in range(20)]
    path = write(tmp_path / "run.jsonl", *decay(10_000, names, timings={"pack": 0.1}))
    with path.open("a") as file:
        file.writelines(json.dumps(note(i, message="spike " * 99)) + "\n" for i in range(0, 10_000, 2))
    page = page_of(tmp_path, path)
    assert len(page.source.encode()) < 3_000_000
    assert "5,000" in page.text
    assert "4,950 more" in page.text
    assert len(page.of("li")) == 51
    assert "others" not in page.text  # in the picture only


def test_the_numbers_of_the_summary(tmp_path):
    steps = [line(i, term("kl", value=float(i), weight=2.0, norm=1.5), norm=1.0) for i in range(20)]
    steps[4] = line(4, term("kl", value=None, norm=None))
    run = read_run(write(tmp_path / "run.jsonl", *steps))
    base, kl, total = summary(run)
    assert (kl.last, kl.end, kl.least, kl.greatest) == (38, 37, 0, 38)
    assert (kl.weight, kl.share, kl.nonfinite, kl.steps) == (2, 0.75, 1, 20)
    assert (base.share, base.nonfinite) == (0.25, 0)
    assert (total.last, total.nonfinite) == (40, 1)
    page = page_of(tmp_path, tmp_path / "run.jsonl")
    assert "kl 38 37 0 38 2 19 1.5 3 75.0 % 1" in page.text
    assert "steps not finite 1" in page.text


def test_two_runs_are_compared(tmp_path):
    a = write(tmp_path / "a.jsonl", *(line(i, term("kl"), term("gone"), base=2.0) for i in range(10)))
    b = write(
        tmp_path / "b.jsonl", *(line(i, term("kl", weight=1.0), term("new"), base=1.5) for i in range(20))
    )
    page = page_of(tmp_path, a, b)
    assert "Differences: b against a" in page.text
    assert "base loss 2 1.5 −0.5 −25.0 %" in page.text
    assert "kl 0.5 1 +0.5 +100.0 %" in page.text
    assert "gone only in a 0.5 – –" in page.text
    assert "new only in b – 0.5 –" in page.text
    assert "Summary: a" in page.text


def test_runs_of_unequal_length_are_compared_where_both_have_been(tmp_path):
    """A run that falls by 1 a step: at its own end the longer one would win without being better."""
    a = write(tmp_path / "a.jsonl", *(line(i, base=200.0 - i) for i in range(100)))
    b = write(tmp_path / "b.jsonl", *(line(i, base=200.0 - i) for i in range(50)))
    page = page_of(tmp_path, a, b)
    assert "over the steps 45 to 49, the last tenth of those that both have" in page.text
    assert "a goes on to step 99, which is left out here" in page.text
    assert "base loss 153 153 0 0 %" in page.text
    assert "goes on" not in page_of(tmp_path, a, a).text


def test_runs_without_a_step_in_common_are_taken_at_their_own_ends(tmp_path):
    a = write(tmp_path / "a.jsonl", *(line(i, base=2.0) for i in range(10)))
    b = write(tmp_path / "b.jsonl", *(line(i, base=3.0) for i in range(50, 60)))
    page = page_of(tmp_path, a, b)
    assert "The runs have no step in common: each is taken at its own end" in page.text
    assert "base loss 2 3 +1 +50.0 %" in page.text


def test_a_run_that_logs_rarely_is_taken_at_its_last_step_before_the_end(tmp_path):
    a = write(tmp_path / "a.jsonl", *(line(i, base=float(i)) for i in (0, 30, 100)))
    b = write(tmp_path / "b.jsonl", *(line(i, base=float(i)) for i in range(60)))
    assert "base loss 30 56.5" in page_of(tmp_path, a, b).text


def test_what_is_a_mean_says_so_and_the_title_names_the_folder(tmp_path):
    (tmp_path / "kl 0.1").mkdir()
    path = write(tmp_path / "kl 0.1" / "run.jsonl", *(line(i, base=float(i)) for i in range(50)))
    page = page_of(tmp_path, path)
    assert (
        "loss, last 49 loss, mean of last 5 47 base loss, last 49 base loss, mean of last 5 47" in page.text
    )
    assert "term last mean of last 5 min max weight value ‖gradient‖ weight · ‖gradient‖" in page.text
    assert "<h1>kl 0.1/run</h1>" in page.source
    assert "<title>kl 0.1/run · jaxreg</title>" in page.source
    short = page_of(tmp_path / "b", write(tmp_path / "one.jsonl", line(0))).text
    assert "mean of" not in short.partition("Point at")[0]


def test_every_term_has_a_look_of_its_own():
    for theme in (LIGHT, DARK):
        assert (
            len({(s.color, s.dash) for s in (Style.of(i, theme) for i in (REST, TOTAL, *range(-1, 63)))})
            == 66
        )
        for color in (theme.ink, theme.base, theme.total, *theme.terms, *theme.marks.values()):
            least = (
                4.5 if color == theme.ink else 2.7
            )  # lines are 1.5 points wide, and stand in the tables, too
            assert contrast(color, theme.paper) > least
    assert len(DASHES) * len(LIGHT.terms) >= 63


def contrast(one, other):
    """That of the Web Content Accessibility Guidelines."""

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_text_of_the_page_has_contrast(tmp_path):
    source = page_of(tmp_path, write(tmp_path / "run.jsonl", line(0))).source
    blocks = re.findall(r":root \{(.*?)\}", source, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colors = dict(re.findall(r"--(\w+): (#\w+)", block))
        for name in ("ink", "soft", "bad", "warn"):
            assert contrast(colors[name], colors["paper"]) > 4.5
            assert contrast(colors[name], colors["raised"]) > 4.5


@given(
    arrays(float, st.integers(0, 400), elements=st.floats(-1e6, 1e6) | st.just(np.nan)), st.integers(1, 50)
)  # fmt: skip
def test_thinning_keeps_every_spike(y, buckets):
    curve = thin(np.arange(len(y)), y, buckets)
    assert len(curve.x) == min(buckets, len(y))
    assert (np.diff(curve.x) > 0).all()
    known = y[np.isfinite(y)]
    if len(known):
        assert np.nanmax(curve.high) == known.max()
        assert np.nanmin(curve.low) == known.min()
        there = np.isfinite(curve.mean)
        assert (curve.low[there] <= curve.mean[there] + 1e-6).all()
        assert (curve.mean[there] <= curve.high[there] + 1e-6).all()
    if len(y) <= buckets:
        np.testing.assert_array_equal(curve.mean, y)
    assert BUCKETS >= 200


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.none()


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(st.lists(st.tuples(st.integers(-(2**53), 2**53), NUMBERS, NUMBERS), min_size=1, max_size=5))
def test_no_number_is_too_large_or_too_small_for_a_report(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("numbers")
    lines = []
    for step, value, norm in rows:
        regularizer = term("a", weight=1.0) | {
            "value": value,
            "contribution": value,
            "grad_norm_weighted": norm,
        }
        lines.append(
            line(step, norm=norm, base=value) | {"loss_total": value, "regularizers": {"a": regularizer}}
        )
    Page(report(write(folder / "run.jsonl", *lines), out=folder))
    assert plot(folder / "run.jsonl", folder / "terms.png").stat().st_size > 1000


def test_names_tell_runs_apart(tmp_path):
    path = write(tmp_path / "run.jsonl", line(0))
    assert told_apart([path, path]) == ["run (1)", "run (2)"]
    with pytest.raises(ValueError, match="at most 4 runs, not 5"):
        report(*[path] * 5, out=tmp_path)
    page = page_of(tmp_path, *[path] * 4)
    assert page.text.count("Differences: ") == 3


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys):
    path = write(tmp_path / "run.jsonl", *decay(5, ["kl"]))
    assert __main__.main(["report", str(path), str(path), "-o", str(tmp_path / "a" / "b")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "b" / "report.html")


def test_the_command_says_what_is_wrong_on_one_line(tmp_path, capsys, monkeypatch):
    empty = write(tmp_path / "empty.jsonl")
    run = write(tmp_path / "run.jsonl", line(0))
    for arguments, want in (
        ([str(tmp_path / "none.jsonl")], "none.jsonl: No such file"),
        ([str(empty)], "holds no step of a run"),
        ([str(run), "-o", str(run)], "exists"),
    ):
        assert __main__.main(["report", *arguments]) == 1
        error = capsys.readouterr().err
        assert want in error
        assert error.count("\n") == 1
    for module in ("matplotlib.figure", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    assert __main__.main(["report", str(run), "-o", str(tmp_path / "out")]) == 1
    assert 'needs matplotlib: pip install "jaxreg[plot]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
