"""A line a step through logging, and what happened besides at the level that it has."""

import logging

import pytest
from sink_cases import a_report, compute, event, stop

from jaxreg.telemetry import Warnings, attached, emit, log
from jaxreg.telemetry.logs import Logging


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, "jaxreg")
    caplog.set_level(logging.DEBUG, "mine")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_step_has_its_total_its_terms_and_their_shares(lines):
    with attached(Logging("mine")):
        log(compute(3.0, l2=0.5, off=0.0), step=12)
    # |grad of sum| = √2, of 0.5·sum(x²) = 3√2
    assert lines()[-1] == ("INFO", "step 12: loss 15 = base 6 (25%) + l2 9 (75%) + off 0 (0%)")


def test_without_norms_there_are_no_shares(lines):
    with attached(Logging("mine")):
        log(compute(3.0, norms=False, l2=0.5), step=12)
    assert lines()[-1] == ("INFO", "step 12: loss 15 = base 6 + l2 9")


def test_what_is_not_finite_is_named(lines):
    Logging("mine")(stop(1, compute(1e30, l2=1.0, l1=0.0).to_dict()))
    ((_, line),) = lines()[-1:]
    assert line.startswith("step 1: loss not finite = base 2e+30")
    assert "l2 not finite" in line
    assert "; not finite: l2" in line


@pytest.mark.parametrize(
    ("steps", "every", "logged"),
    [(range(7), 3, 3), ([None] * 7, 3, 3), ([5, 10, 11], 5, 2), ([1, 2], 5, 0)],
)
def test_every_so_many_steps(lines, steps, every, logged):
    sink = Logging("mine", every=every)
    for step in steps:
        sink(stop(step))
    assert len(lines()) == logged


def test_every_is_a_number_of_steps():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        Logging(every=0)


def test_level_and_logger(lines, caplog):
    logger = logging.getLogger("mine")
    Logging(logger, level=logging.DEBUG)(stop(1))
    assert lines()[-1][0] == "DEBUG"
    logger.setLevel(logging.INFO)
    Logging(logger, level=logging.DEBUG)(stop(1))
    assert len(lines()) == 1


@pytest.mark.parametrize("name", ["дивергенция", "100%", "%s", "{x}"])
def test_names_are_no_formats(lines, name):
    Logging("mine")(stop(1, a_report(name)))
    assert f" + {name} 0.5 (67%)" in lines()[-1][1]


ERROR = ValueError("no such token")


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (
            event("custom_loss.exception", error=ERROR),
            ("ERROR", "step 3: it failed: ValueError: no such token"),
        ),
        (
            event("server.exception", error=ERROR),
            ("ERROR", "step 3: the backward request failed: ValueError: no such token"),
        ),
        (
            event("regularizer.compute.exception", None, term="kl", error=ERROR, on_error="raise"),
            ("ERROR", "step: host term 'kl' failed: ValueError: no such token"),
        ),
        (
            event("regularizer.compute.exception", term="kl", error=ERROR, on_error="last"),
            ("WARNING", "step 3: host term 'kl' failed: ValueError: no such token"),
        ),
        (event("compile.start", None, program="train"), ("INFO", "train: compiling ...")),
        (
            event("compile", None, {"duration": 1.2345}, program="train", changed=["x: [3] -> [4]", "y"]),
            ("INFO", "train: compiled in 1.23 s: x: [3] -> [4]; y"),
        ),
        (event("warning", kind="spike", term="kl", message="high"), ("WARNING", "step 3: high")),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_happened_besides(lines, what, line):
    Logging("mine")(what)
    assert lines() == [line]


def test_other_events_have_no_line(lines):
    for name in ("custom_loss.start", "regularizer.compute.stop", "mine"):
        Logging("mine")(event(name, term="l1"))
    assert lines() == []


@pytest.mark.parametrize(("logger", "times"), [("jaxreg", 1), ("jaxreg.warnings", 1), ("", 1), ("mine", 2)])
def test_a_warning_comes_once_to_the_same_place(lines, logger, times):
    """`Warnings` logs its own; a logger above its own has them already."""
    with attached(Warnings(zero_steps=1), Logging(logger)):
        log(compute(0.0, l2=0.5), step=2)
    assert sum("has been 0" in line for _, line in lines()) == 2 * times  # value and gradient


def test_where_loggers_do_not_propagate(lines, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jaxreg"), "propagate", False)
    root = Logging("")
    with attached(root):
        emit("warning", metadata={"kind": "mine", "message": "to the root"})
    assert ("WARNING", "step: to the root") in lines()
