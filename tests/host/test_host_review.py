"""Host terms and telemetry under unfriendly conditions: what an independent review found."""

import asyncio
import copy
import gc
import os
import pickle
import signal
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import Scripted, Slow, make_data
from host_functions import count

import jaxreg as jr
from jaxreg.base import events as _events
from jaxreg.host import HostRegularizer, HostTermError
from jaxreg.host.calls import HostCalls
from jaxreg.telemetry import FlightRecorder, Inputs, Warnings, attached, emit, log, read_recording, replay

LIKE = [np.full(3, -1.0, np.float32)]


def zero(x, batch):
    return 0.0 * batch.sum(x)


def ones(data, logprobs):
    return 1.0, {}, [np.ones_like(lp) for lp in logprobs]


class TestGradients:
    def test_what_overflows_float32_is_refused(self):
        def large(data, logprobs):
            return 1.0, {}, [np.full(lp.shape, 1e39) for lp in logprobs]

        client = Slow()
        with (
            HostRegularizer("large", large, 1.0) as term,
            pytest.raises(HostTermError, match="in float32 inf"),
        ):
            jr.client.forward_backward_custom(client, make_data(), jr.compose(zero, [term]))
        with (
            HostRegularizer("value", lambda data: 1e39, 1.0) as term,
            pytest.raises(HostTermError, match="float32"),
        ):
            jr.client.forward_backward_custom(client, make_data(), jr.compose(zero, [term]))
        assert "backward" not in client.order

    def test_a_weight_that_makes_it_overflow(self):
        def large(data, logprobs):
            return 1.0, {}, [np.full(lp.shape, 1e30) for lp in logprobs]

        client = Slow()
        with (
            HostRegularizer("large", large, 1e10) as term,
            pytest.raises(
                jr.client.NonFiniteGradient, match="term 'large' at its weight of 1e\\+10"
            ) as error,
        ):
            jr.client.forward_backward_custom(client, make_data(), jr.compose(zero, [term]))
        assert error.value.terms == ("large",)
        assert "backward" not in client.order

    def test_logprobs_cannot_be_edited(self):
        def edits(data, logprobs):
            for lp in logprobs:
                np.exp(lp, out=lp)
            return 1.0

        given = [np.full(len(d.model_input), -1.0, np.float32) for d in make_data()]
        with HostRegularizer("edits", edits, 1.0) as term, pytest.raises(HostTermError, match="read-only"):
            jr.client.forward_backward_custom(
                Scripted(), make_data(), jr.compose(zero, [term]), logprobs=given
            )
        assert all((lp == -1.0).all() for lp in given)

    def test_a_masked_token_is_out_of_it(self):
        data = make_data()
        for datum in data:
            datum.loss_fn_inputs["mask"] = np.arange(len(datum.model_input)) != 1
        client = Slow()
        with HostRegularizer("ones", ones, 1.0) as term:
            objective = jr.compose(zero, [term])
            jr.client.forward_backward_custom(client, data, objective)
            for sent, datum in zip(client.backward_data, data, strict=True):
                mask = datum.loss_fn_inputs["mask"].astype(np.float32)
                np.testing.assert_array_equal(sent.loss_fn_inputs["weights"], -mask)
            batch = jr.TokenBatch.pack(data)
            _, local = objective.value_and_grad(-jnp.ones(batch.shape), batch)
        np.testing.assert_array_equal(local, np.asarray(batch.mask, np.float32))

    def test_params_in_a_list(self):
        def fn(data, params):
            return float(sum(np.sum(p) for p in params)), {}, [np.ones_like(p) for p in params]

        batch = jr.TokenBatch.pack([{"y": [1.0, 2.0]}])
        with HostRegularizer("fn", fn, 1.0, on="params") as term:
            objective = jr.compose(
                lambda x, batch: 0.0 * jnp.sum(x), [term], forward=lambda p, batch: p[0] * batch["y"] + p[1]
            )
            _, grads = objective.value_and_grad([jnp.ones(()), jnp.ones(())], batch)
        assert [g.item() for g in grads] == [1.0, 1.0]


class TestThreads:
    def test_a_handler_that_waits_for_a_program_with_a_host_term(self):
        release = threading.Event()

        def fn(data, x):
            release.wait(30)
            return 1.0

        with HostRegularizer("fn", fn, 1.0) as term:
            step = jax.jit(jr.compose(lambda x, batch: jnp.sum(x), [term]).__call__)
            heard = []

            def handler(event):
                heard.append(event.name)
                if event.name == "go":
                    release.set()
                    heard.append(float(step(jnp.ones(3))[0]))

            with attached(handler):
                emit("go")
        assert 4.0 in heard
        assert "regularizer.compute.start" in heard

    def test_closing_ends_calls_that_wait_for_their_place(self):
        began = threading.Event()

        async def waits(data):
            began.set()
            await asyncio.sleep(1e6)

        term = HostRegularizer("waits", waits, 1.0, timeout=None, max_concurrency=1)
        steps = [HostCalls([term], LIKE) for _ in range(2)]
        for step in steps:
            step.start(None)
        assert began.wait(60)
        term.close()
        for step in steps:
            with pytest.raises(HostTermError, match="cancelled"):
                step.collect()

    def test_cancelling_does_not_wait_for_a_loop_that_is_blocked(self, monkeypatch):
        monkeypatch.setattr("jaxreg.host.runners.GRACE", 3600.0)
        release = threading.Event()

        async def blocks(data):
            release.wait()
            return 1.0

        term = HostRegularizer("blocks", blocks, 1.0)
        calls = HostCalls([term], LIKE)
        calls.start(None)
        calls.cancel()  # would stand still for an hour
        release.set()
        monkeypatch.undo()
        term.close()

    def test_a_process_that_died_while_it_was_idle(self):
        with HostRegularizer("count", count, 1.0, run="process") as term:
            for _ in range(2):
                calls = HostCalls([term], LIKE)
                calls.start([1, 2])
                assert calls.collect()["count"].value == 2.0
                (worker,) = term.runtime.runner._idle
                os.kill(worker._process.pid, signal.SIGKILL)
                worker._process.join()


class TestMemory:
    def test_a_step_frees_what_the_objective_closes_over(self):
        class Big:
            """Something large."""

        big = Big()
        seen = weakref.ref(big)
        objective = jr.compose(lambda x, batch, big=big: batch.sum(x))
        jr.client.forward_backward_custom(Scripted(), make_data(), objective).result()
        del objective, big
        gc.collect()
        assert seen() is None

    def test_a_term_given_to_the_client_goes_when_it_is_dropped(self):
        term = HostRegularizer("ones", ones, 1.0)
        seen = weakref.ref(term)
        client, data = Scripted(), make_data()
        for _ in range(2):
            jr.client.forward_backward_custom(client, data, zero, regularizers=[term]).result()
        assert len(term.compositions) == 1
        del term
        gc.collect()
        assert seen() is None

    def test_calls_are_freed_without_the_garbage_collector(self):
        class Big(list):
            """A result that can be watched."""

        seen = []

        def fails(data):
            big = Big()
            seen.append(weakref.ref(big))
            raise ValueError

        gc.disable()
        try:
            with HostRegularizer("fails", fails, 1.0, on_error="skip") as term:
                for _ in range(3):
                    calls = HostCalls([term], LIKE)
                    calls.start(None)
                    calls.collect()
                    del calls
                deadline = time.monotonic() + 60
                while any(ref() is not None for ref in seen) and time.monotonic() < deadline:
                    time.sleep(0.01)
            assert [ref() for ref in seen] == [None] * 3
        finally:
            gc.enable()

    def test_a_used_term_can_be_copied_and_pickled(self):
        with HostRegularizer("count", count, 1.0) as term:
            calls = HostCalls([term], LIKE)
            calls.start([1])
            calls.collect()
            for other in (copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
                assert (other.name, other.fn, "runtime" in vars(other)) == ("count", count, False)


class TestTelemetry:
    def test_donated_params_do_not_silence_the_warnings(self):
        heard = []
        x = jnp.array([-1.0])
        objective = jr.compose(lambda x, batch: jnp.sum(jnp.log(x)))
        with attached(Warnings(), heard.append):
            _, out = objective(x)
            out = jax.block_until_ready(out)
            x.delete()
            log(out, step=0, inputs=Inputs(objective, x))
        assert [e.metadata["kind"] for e in heard if e.name == "warning"] == ["nonfinite"]

    def test_the_recorder_with_donated_state_odd_steps_and_deep_trees(self, tmp_path):
        schedule = optax.constant_schedule(0.5)
        objective = jr.compose(
            lambda x, batch: jnp.sum(jax.tree.leaves(x)[0]),
            [dict(name="s", fn=lambda x, batch: jnp.sum(jax.tree.leaves(x)[0]), weight=schedule)],
        )
        x = jnp.array([jnp.nan])
        for _ in range(20):
            x = {"deeper": x}
        for i, step in enumerate((np.int64(3), jnp.int32(4))):
            state = objective.init()
            _, out = jax.block_until_ready(objective(x, state=state))
            jax.tree.map(lambda leaf: leaf.delete(), state)
            with attached(FlightRecorder(tmp_path / str(i))) as (recorder,):
                log(out, step=step, inputs=Inputs(objective, x, state=state))
            (recorded,) = read_recording(recorder.written[0])
            assert (recorded.step, recorded.weights) == (int(step), {"s": 0.5})

    def test_a_copy_is_one(self, tmp_path):
        objective = jr.compose(lambda x, batch: jnp.sum(x))
        buffer = np.zeros(1, np.float32)
        with attached(FlightRecorder(tmp_path, copy=True)) as (recorder,):
            for i in range(3):
                buffer[:] = i
                log(objective(buffer)[1], step=i, inputs=Inputs(objective, buffer))
        assert [s.part("x").tolist() for s in read_recording(recorder.dump())] == [[0.0], [1.0], [2.0]]

    def test_a_failure_before_the_step_does_not_hide_the_next(self, tmp_path):
        objective = jr.compose(lambda x, batch: jnp.sum(jnp.log(x)))
        with attached(FlightRecorder(tmp_path)) as (recorder,):
            emit("custom_loss.exception", metadata={"error": ValueError("data"), "inputs": None})
            x = -jnp.ones(1)
            log(objective(x)[1], inputs=Inputs(objective, x))
        assert len(recorder.written) == 1

    @pytest.mark.parametrize(
        "x", ["abc", np.arange(3), ["a"], [], [np.zeros((0, 2**40))], [np.zeros((1, 200_000))], {"list": 3}]
    )
    def test_a_recording_with_a_strange_x(self, tmp_path, x):
        objective = jr.compose(jr.losses.CrossEntropy())
        batch = jr.TokenBatch.pack([{"y": np.ones(8)} for _ in range(64)])
        with attached(FlightRecorder(tmp_path)) as (recorder,):
            _, out = objective(-jnp.ones(batch.shape), batch)
            log(out, inputs=Inputs(objective, x, batch))
        with pytest.raises(ValueError, match="step None|x "):
            replay(recorder.dump(), objective)

    def test_a_file_that_is_too_large(self, tmp_path):
        objective = jr.compose(lambda x, batch: jnp.sum(x))
        with attached(FlightRecorder(tmp_path)) as (recorder,):
            log(objective(jnp.ones(3))[1], inputs=Inputs(objective, np.ones(3)))
        with pytest.raises(ValueError, match="max_bytes=10"):
            read_recording(recorder.dump(), max_bytes=10)

    def test_a_handler_that_raises_is_closed_and_one_that_is_gone_hears_nothing(self):
        closed, heard = [], []

        class Broken:
            def __call__(self, event):
                jr.telemetry.detach(heard.append)
                raise ValueError

            def close(self):
                closed.append(True)

        with attached(Broken(), heard.append):
            emit("x")
        assert closed == [True]
        assert heard == []

    def test_listeners_that_somebody_else_cleared(self):
        with attached(lambda event: None):
            jax.monitoring.clear_event_listeners()
        assert not _events.listening()

    def test_an_interrupt_in_a_handler_reaches_all_and_then_the_loop(self):
        heard = []

        def interrupted(event):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), attached(interrupted, heard.append):
            emit("x")
        assert len(heard) == 1

    def test_a_skipped_term_is_no_nan(self):
        def fails(data, x):
            raise ValueError

        with HostRegularizer("kb", fails, 1.0, on_error="skip", metrics=("hits",)) as term:
            _, out = jr.compose(lambda x, batch: jnp.sum(x), [term])(jnp.ones(2))
            assert "nonfinite" not in out.to_dict()

    def test_a_term_that_cannot_be_started_ends_the_step(self, monkeypatch):
        heard = []

        def no_more(*args, **kwargs):
            raise RuntimeError("can't start new thread")

        with HostRegularizer("count", count, 1.0) as term, attached(heard.append):
            monkeypatch.setattr("jaxreg.host.runners.threading.Thread", no_more)
            with pytest.raises(RuntimeError, match="new thread"):
                jr.client.forward_backward_custom(Scripted(), make_data(), jr.compose(zero, [term]))
        assert [e.name for e in heard if e.name.startswith("custom_loss")] == [
            "custom_loss.start",
            "custom_loss.exception",
        ]

    def test_two_objectives_of_equal_names_are_told_apart(self):
        heard = []
        kept = [
            jr.compose(lambda x, batch: jnp.sum(x), [dict(name="twin", fn=fn, weight=1.0)])
            for fn in (lambda x, b: jnp.sum(x), lambda x, b: jnp.max(x))
        ]
        with attached(heard.append):
            for n in (2, 3, 4):
                for objective in kept:
                    objective(jnp.ones(n))
        changed = [e.metadata["changed"] for e in heard if e.name == "compile"]
        assert changed[2:] == [
            ["x: float32[2] -> float32[3]"],
            ["x: float32[2] -> float32[3]"],
            ["x: float32[3] -> float32[4]"],
            ["x: float32[3] -> float32[4]"],
        ]
