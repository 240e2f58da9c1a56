"""A run's file is read whole, each step once, whatever stands between."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_cases import decay, line, note, term, write

import jaxreg as jr
from jaxreg.watching.records import Lines, Note, Record, parse
from jaxreg.watching.run import Run, Tail, read_run


def run_of(*objects):
    run = Run()
    for o in objects:
        run.add(parse(json.dumps(o).encode()))
    return run


def test_what_to_dict_writes_is_read_back(tmp_path):
    import jax.numpy as jnp

    l2 = dict(name="l2", fn=lambda x, b: (jnp.sum(x**2), {"max": jnp.max(x)}), weight=0.5)
    objective = jr.compose(lambda x, b: jnp.sum(x), [l2], track_grad_norms=True)
    outs = [objective.value_and_grad(jnp.full(3, float(i)))[0][1] for i in range(3)]
    lines = [{"step": i, **out.to_dict(), "timings": {"pack": 0.5}} for i, out in enumerate(outs)]
    run = read_run(write(tmp_path / "run.jsonl", *lines))
    assert run.terms == ["l2"]
    assert run.skipped == 0
    for name in outs[0].to_flat_dict():
        np.testing.assert_allclose(run.series(name), [o.to_flat_dict()[name] for o in outs], rtol=1e-6)
    assert run.of("l2", "max").tolist() == [0, 1, 2]
    assert run.series("timings/pack").tolist() == [0.5] * 3


def test_missing_is_nan_and_terms_come_and_go():
    run = run_of(line(0, term("a")), line(1, term("b", value=None)), line(2, term("a", norm=None), term("b")))
    assert run.terms == ["a", "b"]
    np.testing.assert_array_equal(run.series("reg/a/contribution"), [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(run.series("reg/b/value"), [np.nan, np.nan, 1])
    assert run.present("a").tolist() == [True, False, True]
    assert run.present("b").tolist() == [False, True, True]
    assert run.nonfinite("b").tolist() == [False, True, False]
    assert run.nonfinite().tolist() == [False, True, False]
    assert run.has("reg/a/value")
    assert not run.has("reg/c/value")


def test_a_wrong_name_is_answered_with_the_right_one():
    run = run_of(line(0, term("kl")))
    with pytest.raises(KeyError, match="did you mean 'reg/kl/value'"):
        run.series("reg/kl/valeu")
    with pytest.raises(KeyError, match="has no term 'k'; it has base_loss, kl"):
        run.share("k")


def test_shares_are_of_the_sum_of_the_weighted_norms():
    run = run_of(line(0, term("a", weight=0.5, norm=4.0), term("b", weight=1.0, norm=1.0), norm=1.0))
    assert [run.share(n).item() for n in ("base_loss", "a", "b")] == [0.25, 0.5, 0.25]


def test_shares_are_unknown_where_a_norm_is_not_finite_or_none_is_tracked():
    broken = term("a", value=None, norm=None)
    run = run_of(line(0, broken, term("b")), line(1, term("a"), term("b", norm=None)), line(2, norm=None))
    np.testing.assert_array_equal(run.share("b"), [np.nan] * 3)
    # An untracked term (a host term without a gradient) pulls nothing, so the others are known.
    np.testing.assert_array_equal(run.share("a"), [np.nan, 0.5, np.nan])
    assert np.isnan(run_of(line(0, norm=0.0)).share("base_loss")).all()


def test_a_run_resumed_from_an_older_checkpoint_has_each_step_once():
    first = [line(i, term("a", value=1.0)) for i in range(6)]
    again = [line(i, term("b", value=9.0)) for i in range(3, 8)]
    run = run_of(*first, *again)
    assert run.steps.tolist() == list(range(8))
    np.testing.assert_array_equal(run.series("reg/a/value"), [1, 1, 1, *[np.nan] * 5])
    np.testing.assert_array_equal(run.series("reg/b/value"), [*[np.nan] * 3, *[9] * 5])
    assert run_of(line(4), line(4, base=7.0)).series("loss/base").tolist() == [7]


def test_notes_of_steps_that_are_superseded_go_and_others_stay():
    run = run_of(
        line(0), note(1, message="stays"), line(1), note(2, message="goes"), line(2),
        note(3, "custom_loss.exception", error="why it ended"), note(2, message="of the new start"), line(2),
    )  # fmt: skip
    assert [n.text for n in run.notes] == ["stays", "why it ended", "of the new start"]


def test_a_step_without_a_number_is_the_next():
    assert run_of(line(None), line(None), line(7), line(None)).steps.tolist() == [0, 1, 7, 8]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_whatever_steps_are_logged_each_is_there_once_and_the_last_wins(steps):
    run = run_of(*(line(step, base=float(i)) for i, step in enumerate(steps)))
    want = {}
    for i, step in enumerate(steps):
        want = {s: v for s, v in want.items() if s < step} | {step: float(i)}
    assert run.steps.tolist() == list(want)
    assert run.series("loss/base").tolist() == list(want.values())
    assert len(run.nonfinite()) == len(want)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("step", "time", "loss_total", "base_loss", "regularizers", "event", "nonfinite", "metrics", "timings")
NEARLY = st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1).map(lambda d: line(3, term("a")) | d)
GARBAGE = st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")) | (JSON | NEARLY).map(
    lambda value: json.dumps(value).encode()
)


@given(st.lists(GARBAGE, max_size=6))
def test_garbage_is_counted_and_never_fatal(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("garbage") / "run.jsonl"
    good = json.dumps(line(2**50, term("a"))).encode()
    path.write_bytes(b"\n".join([*lines, good, b'{"step": 3, "loss_t']))
    run = read_run(path)
    assert 2**50 in run.steps
    assert 1 <= run.skipped <= len(lines) + 1
    for name in run.names:
        assert run.series(name).shape == run.steps.shape
    assert all(isinstance(n.text, str) and n.level for n in run.notes)


@pytest.mark.parametrize(
    "wrong",
    [
        b"[1, 2]", b"7", b'"text"', b"{}", b"\xff\xfe\x00", b"[" * 100_000,
        b'{"step": 1' + b"0" * 9000 + b"}",
        b'{"step": "1", "loss_total": 1}', b'{"step": 1.5, "loss_total": 1}',
        b'{"step": true, "loss_total": 1}',
        b'{"loss_total": 1, "regularizers": [1]}', b'{"loss_total": 1, "regularizers": {"a": 1}}',
        b'{"loss_total": "1"}', b'{"loss_total": 1, "nonfinite": "a"}', b'{"event": 1}',
        b'{"event": "x", "step": {}}',
        b'{"loss_total": 1, "timings": {"a": "b"}}', b'{"loss_total": 1, "metrics": 3}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_refused(wrong):
    with pytest.raises(ValueError):  # noqa: PT011 (what is refused matters, not how)
        parse(wrong)


def test_nan_and_infinity_are_read_as_not_finite():
    record = parse(
        b'{"loss_total": NaN, "base_loss": {"value": Infinity}, "regularizers": {"a": {"value": null}}}'
    )
    assert isinstance(record, Record)
    assert set(record.nonfinite) == {"base_loss", "a"}
    assert all(np.isnan(v) for v in record.values.values())


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(1, 7), min_size=1, max_size=9))
def test_lines_come_whole_however_they_are_cut(lengths, cuts):
    data = b"\n".join(b"x" * n for n in lengths)
    lines, got, at = Lines(huge=7), [], 0
    while at < len(data):
        size = cuts[at % len(cuts)]
        got += lines.feed(data[at : at + size])
        at += size
    got += lines.rest()
    assert got == [b"x" * n for n in lengths if 0 < n <= 7]
    assert lines.skipped == sum(n > 7 for n in lengths)


def test_a_file_without_a_step_is_an_error_that_says_what_it_holds(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no step of a run: it is empty so far"):
        read_run(path)
    path.write_bytes(b"a\nb\n")
    with pytest.raises(ValueError, match="none of its 2 lines is one"):
        read_run(path)
    with pytest.raises(ValueError, match="only 1 note"):
        read_run(write(path, note(0)))
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "none.jsonl")


def steps_of(tail):
    return [item.step for item in tail.poll()]


def test_a_tail_waits_for_the_rest_of_a_line(tmp_path):
    path = tmp_path / "run.jsonl"
    tail = Tail(path)
    with pytest.raises(FileNotFoundError):
        steps_of(tail)
    text = json.dumps(line(1))
    with path.open("w") as file:
        for part, want in (
            (json.dumps(line(0)) + "\n" + text[:30], [0]),
            (text[30:], []),
            ("\n", [1]),
            ("", []),
        ):
            file.write(part)
            file.flush()
            assert steps_of(tail) == want
    assert (tail.skipped, tail.restarts) == (0, 0)


@pytest.mark.parametrize("how", ["truncated", "replaced", "rewritten longer"])
def test_a_tail_starts_over_where_the_file_is_another(tmp_path, how):
    path = tmp_path / "run.jsonl"
    tail = Tail(write(path, *map(line, range(5))))
    assert steps_of(tail) == [0, 1, 2, 3, 4]
    if how == "replaced":
        os.replace(write(tmp_path / "new", *map(line, range(10, 20))), path)
    else:
        write(path, *map(line, range(10, 12 if how == "truncated" else 20)))
    assert steps_of(tail)[:2] == [10, 11]
    assert tail.restarts == 1
    assert steps_of(tail) == []


def test_a_tail_and_a_reader_agree_on_a_long_file(tmp_path):
    path = write(
        tmp_path / "run.jsonl", *decay(300, ["a", "b"]), note(299, "compile", program="step", seconds=1.0)
    )
    run, tail = read_run(path), Tail(path)
    items = list(tail.poll())
    assert [i.step for i in items if isinstance(i, Record)] == run.steps.tolist()
    assert [i for i in items if isinstance(i, Note)] == run.notes


@pytest.mark.parametrize(
    ("details", "text"),
    [
        (note(1, message="spike", term="kl"), "kl: spike"),
        (note(1, message="term 'kl': spike", term="kl"), "term 'kl': spike"),
        (note(1, "regularizer.compute.exception", term="judge", error="E: a\n b"), "judge: E: a b"),
        (
            note(
                1,
                "regularizer.compute.exception",
                term="kb",
                error="HostTermError: host term 'kb': OSError: no",
            ),
            "kb: OSError: no",
        ),
        (note(1, "server.exception", error="timeout"), "the server: timeout"),
        (note(1, "compile", program="f", seconds=2.0, changed=["shape", "dtype"]), "f in 2 s (shape, dtype)"),
        (note(1, "compile"), "a program"),
        (note(1, "warning", kind="dominates"), "dominates"),
        (note(None, "something.new"), "something.new"),
    ],
)
def test_a_note_says_what_happened_on_one_line(details, text):
    assert run_of(details).notes[0].text == text


def test_reading_and_importing_need_no_extra():
    code = (
        "import sys, jaxreg, jaxreg.__main__; from jaxreg.watching import console, plots, report, run;"
        # Flax brings rich and imports it itself; jaxreg's only module that does must not be in.
        "print([m for m in ('matplotlib', 'PIL', 'jaxreg.watching.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
