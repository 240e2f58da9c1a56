"""The numbers of a page, as a browser gets them: exact, spikes and all, and never more than data."""

import base64
import json
import re
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from run_cases import decay, line, term, write

import jaxreg as jr
from jaxreg.watching import gallery, live
from jaxreg.watching.live import decimated
from jaxreg.watching.metrics import logged, reported
from jaxreg.watching.run import read_run

NASTY = ["</script><script>alert(1)</script>", "<!--<script>", "]]>&amp;\u2028", '"\\', "\ud800\x00"]


def numbers(data, line):
    """A line's steps and numbers, read as the page's script reads them."""
    x, y = data["x"][line["x"]], data["y"][line["y"]]
    steps = x.get("steps") or [x["from"] + i * x["by"] for i in range(x["n"])]
    if isinstance(y, str):
        y = np.frombuffer(base64.b64decode(y, validate=True), "<f4")
    return np.array(steps), np.broadcast_to(y, len(steps))


def data_of(tmp_path, *lines, room=live.ROOM):
    run = read_run(write(tmp_path / "run.jsonl", *lines))
    return run, json.loads(live.data(gallery.gallery([run]), room))


def test_short_runs_are_there_as_they_are(tmp_path):
    run, data = data_of(tmp_path, *decay(40, ["kl", "l2"]))
    chart = next(chart for chart in data["charts"] if chart["name"] == "contributions")
    for own in chart["panels"][0]["lines"]:
        name = {"base loss": "base_loss"}.get(own["label"], own["label"])
        steps, values = numbers(data, own)
        np.testing.assert_array_equal(steps, run.steps)
        np.testing.assert_allclose(values, run.of(name, "contribution"), rtol=1e-6)
        assert own["last"] == pytest.approx(run.of(name, "contribution")[-1])
    weights = next(chart for chart in data["charts"] if chart["name"] == "weights")
    assert [data["y"][own["y"]] for own in weights["panels"][0]["lines"]] == [
        1,
        0.1,
    ]  # a constant is a number


def test_long_runs_keep_every_spike_and_the_page_its_size(tmp_path):
    steps = [line(i, term("kl", value=99.0 if i == 4321 else 1.0)) for i in range(9000)]
    _, data = data_of(tmp_path, *steps)
    values = next(chart for chart in data["charts"] if chart["name"] == "values")
    x, y = numbers(data, values["panels"][0]["lines"][1])
    assert len(x) == 2000
    assert y.max() == 99
    assert abs(x[y.argmax()] - 4321) < 9
    _, less = data_of(tmp_path, *steps, room=5000)
    assert max(x["n"] for x in less["x"]) < 500


@given(
    arrays(float, st.integers(1, 300), elements=st.floats(-1e6, 1e6) | st.just(np.nan)), st.integers(2, 40)
)
def test_decimation_keeps_the_least_and_the_greatest(y, points):
    x, short = decimated(np.arange(len(y)), y, points)
    assert len(x) == len(short) <= max(points, min(len(y), points))
    assert (np.diff(x) > 0).all()
    known = y[np.isfinite(y)]
    if len(known):
        assert np.nanmax(short) == known.max()
        assert np.nanmin(short) == known.min()
    assert set(short[np.isfinite(short)]) <= set(known)


def test_missing_numbers_are_gaps(tmp_path):
    _, data = data_of(tmp_path, *(line(i, term("kl", value=None if i == 2 else float(i))) for i in range(5)))
    values = next(chart for chart in data["charts"] if chart["name"] == "values")
    _, y = numbers(data, values["panels"][0]["lines"][1])
    np.testing.assert_array_equal(y, [0, 1, np.nan, 3, 4])


@pytest.mark.parametrize("name", NASTY)
def test_no_name_ends_the_script_that_holds_it(tmp_path, name):
    lines = [line(i, term(name, **{name: 1.0 + i}), metrics={name: 1.0 + i}) for i in range(3)]
    run = read_run(write(tmp_path / "run.jsonl", *lines))
    text = live.data(gallery.gallery([run]))
    assert not set(text) & set("<>&\u2028\u2029\x00")
    assert text.isascii()
    labels = {
        own["label"] for chart in json.loads(text)["charts"] for p in chart["panels"] for own in p["lines"]
    }
    assert any(
        label.startswith(name[:5].replace("\ud800", "\ufffd").replace("\x00", "\ufffd")) for label in labels
    )


def test_only_the_pages_own_scripts_may_run_and_nothing_is_fetched(tmp_path):
    pytest.importorskip("matplotlib")
    page = jr.telemetry.report(write(tmp_path / "run.jsonl", *decay(9, ["kl"])), out=tmp_path).read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == " ".join(map(live.digest, scripts))
    assert len(scripts) == 2
    assert "Permission is hereby granted" in scripts[0]  # the library's licence goes with it
    assert "eval(" not in page
    assert "innerHTML = '<svg" in scripts[1]
    assert scripts[1].count("innerHTML") == 1  # a constant; names are set as text


def test_what_was_logged_besides_is_on_the_page(tmp_path):
    lines = [
        line(i, term("kl", max=float(i), **{"a/b": 1.0}), term("l2", max=2.0 * i),
             metrics={"accuracy": i / 10, "optim/learning_rate": 1e-3, "loss/val": 3.0, "gone": None})
        for i in range(10)
    ]  # fmt: skip
    for own in lines:
        own["base_loss"]["custom"] = {"perplexity": 2.0}
    run, data = data_of(tmp_path, *lines)
    assert logged(run) == ["accuracy", "optim/learning_rate", "loss/val", "gone"]
    assert reported(run) == {"perplexity": ["base_loss"], "max": ["kl", "l2"], "a/b": ["kl"]}
    metrics = next(chart for chart in data["charts"] if chart["name"] == "metrics")
    panels = {panel["title"]: [own["label"] for own in panel["lines"]] for panel in metrics["panels"]}
    assert panels == {
        "accuracy": [""], "optim/learning_rate": [""], "loss/val": [""],
        "perplexity · base loss": ["base loss"], "max": ["kl", "l2"], "a/b · kl": ["kl"],
    }  # fmt: skip
    _, y = numbers(data, metrics["panels"][0]["lines"][0])
    np.testing.assert_allclose(y, np.arange(10) / 10, rtol=1e-6)


def test_many_metrics_are_counted_where_they_have_no_room(tmp_path):
    names = [f"m{i:02d}" for i in range(30)]
    run, data = data_of(tmp_path, *(line(i, metrics=dict.fromkeys(names, 1.0)) for i in range(3)))
    metrics = next(chart for chart in gallery.gallery([run]) if chart.name == "metrics")
    assert len(metrics.panels) == 24
    assert metrics.notes == ("in the file only, for want of room: m24, m25, m26, m27, m28, m29.",)


def test_what_the_page_carries_is_in_the_package_with_its_licence():
    folder = resources.files("jaxreg.watching").joinpath("static")
    files = {file.name for file in folder.iterdir()}
    assert {
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "LICENSE-uPlot",
        "README.md",
        "report.js",
        "report.css",
    } <= files
    (version,) = re.findall(r"\(v([\d.]+)\)", folder.joinpath("uPlot.iife.min.js").read_text()[:100])
    assert f"uPlot) {version}," in folder.joinpath("README.md").read_text()
    project = Path(jr.__file__).parents[1] / "pyproject.toml"
    if project.exists():  # not where the package is installed
        built = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert built == {"packages": ["jaxreg"]}  # every file of the package, whatever its ending
