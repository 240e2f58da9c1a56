"""The flight recorder: what it keeps, that it survives, and that a replay finds the culprit."""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import Scripted, make_data
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxreg as jr
from jaxreg.base import msgpack as _msgpack
from jaxreg.recorder.recording import from_plain, to_plain
from jaxreg.telemetry import (
    FlightRecorder,
    Inputs,
    Lost,
    attached,
    diagnose,
    log,
    read_recording,
    replay,
)


def logs(x, batch):
    """NaN where p is negative, −inf where it is 0."""
    return batch.mean(jnp.log(batch["p"]) + x)


def make_objective(weight=0.5):
    """What the tests replay with, by its name."""
    return jr.compose(
        jr.losses.CrossEntropy(),
        [
            dict(name="l1", fn=jr.regularizers.L1(), weight=0.1),
            dict(name="logs", fn=logs, weight=weight),
        ],
        track_grad_norms=True,
    )


OBJECTIVE = make_objective(0.25)


def make_batch(bad=None):
    rows = [{"p": np.full(n, 0.5, np.float32)} for n in (3, 5, 2)]
    if bad is not None:
        rows[1]["p"][3] = bad
    return jr.TokenBatch.pack(rows)


def record(tmp_path, bads, **settings):
    """A run whose data is bad in some steps; the recorder."""
    objective = make_objective()
    with attached(FlightRecorder(tmp_path, **settings)) as (recorder,):
        for step, bad in enumerate(bads):
            batch = make_batch(bad)
            x = -jnp.ones(batch.shape)
            (_, out), _ = objective.value_and_grad(x, batch)
            log(out, step=step, inputs=Inputs(objective, x, batch))
    return recorder


class TestRecorder:
    def test_one_file_an_episode(self, tmp_path):
        recorder = record(tmp_path, [None, -1.0, -1.0, None, -1.0], steps=2)
        assert [path.name for path in recorder.written] == ["step-00000001.flight", "step-00000004.flight"]
        assert [[s.step for s in read_recording(path)] for path in recorder.written] == [[0, 1], [3, 4]]
        assert sorted(tmp_path.iterdir()) == recorder.written  # nothing half-written beside them

    def test_no_more_files_than_allowed(self, tmp_path):
        assert len(record(tmp_path, [-1.0, None] * 4, files=2).written) == 2

    def test_asked_for(self, tmp_path):
        recorder = record(tmp_path, [None, None])
        assert recorder.written == []
        path = recorder.dump()
        assert [s.step for s in read_recording(path)] == [0, 1]
        assert recorder.dump(tmp_path / "mine").name == "mine"
        with pytest.raises(ValueError, match=r"no step yet.*inputs=Inputs"):
            FlightRecorder(tmp_path).dump()

    def test_a_donated_array_is_said_to_be_lost_and_a_copy_is_not(self, tmp_path):
        objective = make_objective()
        batch = make_batch(-1.0)
        for copy in (False, True):
            x = -jnp.ones(batch.shape)
            with attached(FlightRecorder(tmp_path / str(copy), copy=copy)) as (recorder,):
                _, out = objective(x, batch)
                out = jax.tree.map(lambda a: a if a.ndim else jnp.where(True, 1.0, a), out)
                log(out, inputs=Inputs(objective, x, batch))
                x.delete()
            (recorded,) = read_recording(recorder.dump())
            if copy:
                np.testing.assert_array_equal(recorded.part("x"), -1.0)
            else:
                with pytest.raises(Lost, match=r"x was not kept: its array was donated.*copy=True"):
                    recorded.part("x")

    def test_a_full_disk_is_logged_and_the_recorder_goes_on(self, tmp_path, monkeypatch, caplog):
        def full(path, write):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("jaxreg.recorder.recorder.write_whole", full)
            recorder = record(tmp_path, [-1.0])
        assert "could not be written" in caplog.text
        assert "No space left" in caplog.text
        assert recorder.written == []
        assert [s.step for s in read_recording(recorder.dump())] == [0]

    def test_a_folder_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            FlightRecorder(tmp_path / "file")

    def test_a_remote_step_that_raises(self, tmp_path):
        bad = jr.compose(
            jr.losses.CrossEntropy(),
            [dict(name="root", fn=lambda x, batch: batch.sum(jnp.sqrt(x)), weight=1.0)],
        )
        with attached(FlightRecorder(tmp_path)) as (recorder,):
            jr.client.forward_backward_custom(Scripted(), make_data(), make_fine())
            with pytest.raises(jr.client.NonFiniteGradient):
                jr.client.forward_backward_custom(Scripted(), make_data(), bad)
        (path,) = recorder.written
        last = read_recording(path)[-1]
        assert "NonFiniteGradient" in last.error
        found = replay(path, bad)
        assert found.findings[0].term == "root"
        assert "which raised NonFiniteGradient" in str(found)


def make_fine():
    return jr.compose(jr.losses.CrossEntropy())


class TestReplay:
    def test_it_finds_the_culprit(self, tmp_path):
        recorder = record(tmp_path, [None, -1.0])
        done = replay(recorder.written[0], f"{__name__}:make_objective")
        first = done.findings[0]
        assert (first.where, first.term, first.datum) == ("value", "logs", 1)
        assert done.differing == []
        assert math.isnan(done.metrics["reg/logs/value"])
        assert "first: the value of the term 'logs', datum 1: nan" in str(done)

    def test_the_weights_are_those_of_the_step(self, tmp_path):
        recorder = record(tmp_path, [-1.0])
        done = replay(recorder.written[0], OBJECTIVE)
        assert done.metrics["reg/logs/weight"] == 0.5

    def test_an_earlier_step(self, tmp_path):
        recorder = record(tmp_path, [None, -1.0])
        assert replay(recorder.written[0], OBJECTIVE, step=0).findings == []
        with pytest.raises(ValueError, match=r"has no step 7; it has \[0, 1\]"):
            replay(recorder.written[0], OBJECTIVE, step=7)

    def test_another_objective_is_refused_or_seen(self, tmp_path):
        recorder = record(tmp_path, [-1.0])
        other = jr.compose(jr.losses.CrossEntropy(), [dict(name="l1", fn=jr.regularizers.L1(), weight=1.0)])
        with pytest.raises(ValueError, match=r"only there \['logs'\], only in the one given \[\]"):
            replay(recorder.written[0], other)
        changed = jr.compose(
            jr.losses.CrossEntropy(),
            [
                dict(name="l1", fn=jr.regularizers.L2(), weight=0.1),
                dict(name="logs", fn=lambda x, batch: 2.0 * logs(x, batch), weight=0.5),
            ],
        )
        batch = make_batch()
        with attached(FlightRecorder(tmp_path / "fine")) as (fine,):
            x = -2.0 * jnp.ones(batch.shape)
            log(make_objective()(x, batch)[1], inputs=Inputs(make_objective(), x, batch))
        assert "reg/l1/value" in replay(fine.dump(), changed).differing

    def test_schedules_state_key_and_a_model(self, tmp_path):
        schedule = optax.linear_schedule(0.0, 1.0, 10)

        def noisy(x, batch, *, key):
            return jnp.mean(x * jax.random.normal(key, x.shape))

        objective = jr.compose(
            lambda x, batch: jnp.mean(x**2),
            [dict(name="noisy", fn=noisy, weight=schedule)],
            forward=lambda params, batch: params["w"] * batch["x"],
            track_grad_norms=True,
        )
        params, batch = {"w": jnp.float32(2.0)}, {"x": jnp.array([1.0, jnp.nan])}
        state = objective.init()
        with attached(FlightRecorder(tmp_path)) as (recorder,):
            for i in range(3):
                key = jax.random.key(i)
                (_, out), _ = objective.value_and_grad(params, batch, state=state, key=key)
                log(out, step=i, inputs=Inputs(objective, params, batch, state, key))
                state = out.state
        path = recorder.dump()
        done = replay(path, objective)
        assert done.differing == []
        assert done.metrics["reg/noisy/weight"] == pytest.approx(0.2)
        assert [str(f) for f in done.findings[:2]] == [
            "the data 'x', at [1]: nan",
            "what forward returns, at [1]: nan",
        ]

    def test_host_terms_are_left_out(self, tmp_path):
        with (
            jr.host.HostRegularizer("facts", lambda data: 1.0, 1.0) as term,
            attached(FlightRecorder(tmp_path)) as (recorder,),
        ):
            objective = jr.compose(jr.losses.CrossEntropy(), [term])
            jr.client.forward_backward_custom(Scripted(), make_data(), objective)
            done = replay(recorder.dump(), objective)
        assert done.differing == []
        assert "reg/facts/value" not in done.metrics

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("objective", "module:attribute"),
            (":x", "module:attribute"),
            ("no_such_module_at_all:x", "cannot be imported"),
            (f"{__name__}:nothing", "has no 'nothing'"),
            ("math:pi", "is no objective .* but float"),
        ],
    )
    def test_names_that_lead_nowhere(self, tmp_path, name, message):
        recorder = record(tmp_path, [-1.0])
        with pytest.raises(ValueError, match=message):
            replay(recorder.written[0], name)


@flax.struct.dataclass
class Pair:
    a: jax.Array
    b: jax.Array


class TestFiles:
    def test_trees_come_back(self):
        tree = {
            "x": [np.arange(3), (jnp.ones(2, jnp.bfloat16), None, True, "s", 1, 2.5)],
            "batch": make_batch(),
            "key": jax.random.key(3),
            "empty": {},
        }
        back = from_plain(_msgpack.decode(_msgpack.encode(to_plain(tree))), "tree")
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        key, same_key = back.pop("key"), tree.pop("key")
        assert key.dtype == same_key.dtype
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(same_key))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
            np.testing.assert_array_equal(a, b)

    def test_another_pytree_needs_one_alike(self):
        tree = {"state": Pair(jnp.ones(2), jnp.zeros(3))}
        plain = to_plain(tree)
        with pytest.raises(Lost, match=r"tree/state was a pytree of the type Pair with 2 leaves.*like="):
            from_plain(plain, "tree")
        back = from_plain(plain, "tree", {"state": Pair(np.zeros(2), np.ones(3))})
        assert isinstance(back["state"], Pair)
        np.testing.assert_array_equal(back["state"].a, 1.0)
        with pytest.raises(Lost, match=r"has shape \(2,\), but in like= \(5,\)"):
            from_plain(plain, "tree", {"state": Pair(np.zeros(5), np.ones(3))})

    @given(data=st.binary(max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_garbage_is_refused(self, data, tmp_path_factory):
        path = tmp_path_factory.mktemp("g") / "f"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"."):
            read_recording(path)

    @given(seed=st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_a_file_that_was_tampered_with_is_refused_or_read(self, seed, tmp_path_factory):
        folder = tmp_path_factory.mktemp("t")
        good = record(folder, [-1.0]).written[0].read_bytes()
        rng = np.random.default_rng(seed)
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 5):
            bad[at] = rng.integers(256)
        path = folder / "bad"
        path.write_bytes(bytes(bad))
        with contextlib.suppress(ValueError):  # Lost and DecodeError are; nothing else may come
            for recorded in read_recording(path):
                recorded.inputs(OBJECTIVE)

    @given(
        tree=st.recursive(
            st.none() | st.integers(-5, 5) | st.text(max_size=5),
            lambda inner: st.dictionaries(
                st.sampled_from(
                    ["dict", "list", "tuple", "token_batch", "leaves", "lost", "bits", "key", "impl"]
                ),
                inner | st.lists(inner, max_size=3),
                max_size=3,
            ),
            max_leaves=8,
        )
    )
    @settings(max_examples=300, deadline=None)
    def test_a_tree_that_a_stranger_made(self, tree):
        with contextlib.suppress(ValueError):
            from_plain(tree, "x")

    def test_another_version(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(_msgpack.encode({"format": "jaxreg flight recording", "version": 99}))
        with pytest.raises(ValueError, match="version 99; this jaxreg reads 1"):
            read_recording(path)


class TestDiagnose:
    @pytest.mark.parametrize(("bad", "shown"), [(-1.0, "nan"), (0.0, "-inf")])
    def test_a_value_whose_gradient_is_fine(self, bad, shown):
        batch = make_batch(bad)
        findings = diagnose(Inputs(OBJECTIVE, -jnp.ones(batch.shape), batch))
        assert [str(f) for f in findings] == [f"the value of the term 'logs', datum 1: {shown}"]

    def test_a_gradient_with_its_token(self):
        batch = make_batch()
        x = np.array(-jnp.ones(batch.shape))
        x[2, 1] = 0.0
        objective = jr.compose(lambda x, batch: batch.sum(jnp.sqrt(-x)))
        (finding,) = diagnose(Inputs(objective, x, batch))
        assert dataclasses.astuple(finding) == ("gradient", "base_loss", "", 2, (1,), math.inf)
        assert str(finding) == "the gradient of the base loss, datum 2, token 1: inf"

    def test_all_is_well(self):
        batch = make_batch()
        x = np.array(-jnp.ones(batch.shape))
        x[:, 5:] = np.nan  # padding is nobody's business
        assert diagnose(Inputs(OBJECTIVE, x, batch)) == []


def test_the_command(tmp_path, capsys, monkeypatch):
    from jaxreg.__main__ import main

    monkeypatch.setitem(sys.modules, "flight_objective", sys.modules[__name__])
    recorder = record(tmp_path, [None, -1.0])
    path = str(recorder.written[0])
    assert main(["replay", path]) == 0
    shown = capsys.readouterr().out
    assert "--objective module:attribute" in shown
    assert main(["replay", path, "--objective", "flight_objective:OBJECTIVE"]) == 0
    assert "first: the value of the term 'logs', datum 1: nan" in capsys.readouterr().out
    assert main(["replay", path, "--objective", "flight_objective:OBJECTIVE", "--step", "0"]) == 0
    capsys.readouterr()
    for arguments in (["replay", str(tmp_path / "none")], ["replay", path, "--objective", "x"]):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1


def test_logging_names_the_file(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    recorder = record(tmp_path, [-1.0])
    assert f"python -m jaxreg replay {recorder.written[0]}" in caplog.text
