"""Events and handlers: who hears what, and that a handler harms nobody."""

import asyncio
import logging
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from clients import Scripted, Slow, make_data, sft

import jaxreg as jr
from jaxreg.base import events as _events
from jaxreg.telemetry import attach, attached, detach, emit, log


@pytest.fixture(autouse=True)
def _nobody_is_left():
    yield
    assert not _events.listening()


def small(weight=0.5):
    return jr.compose(_total, [dict(name="l2", fn=_square, weight=weight)], track_grad_norms=True)


def _total(x, batch):
    return jnp.sum(x)


def _square(x, batch):
    return jnp.sum(x**2)


class Heard(list):
    """A handler that remembers."""

    def __call__(self, event):
        self.append(event)

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other

    def named(self, name):
        return [event for event in self if event.name == name]


class TestHandlers:
    def test_a_handler_that_raises_is_logged_once_and_detached(self, caplog):
        heard = Heard()

        def broken(event):
            raise ZeroDivisionError("my own fault")

        with attached(broken, heard):
            for _ in range(3):
                emit("x")
        assert len(heard) == 3
        assert len(caplog.records) == 1
        assert "detached" in caplog.text
        assert "my own fault" in caplog.text

    def test_a_slow_handler_is_counted(self, caplog, monkeypatch):
        monkeypatch.setattr(_events, "SLOW", 0.001)
        with attached(lambda event: time.sleep(0.002)):
            for _ in range(12):
                emit("x")
        assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2  # the first, and the tenth
        assert "10 events took longer" in caplog.text

    def test_a_sink_of_ours_says_what_can_be_done_where_it_goes_on_being_slow(self, caplog, monkeypatch):
        monkeypatch.setattr(_events, "SLOW", 0.001)

        class Sink:
            _when_slow = "write to a faster disk"

            def __call__(self, event):
                time.sleep(0.002)

        class Rare(Sink):
            _when_slow = None

        with attached(Sink(), Rare()):
            for _ in range(9):
                emit("x")
            assert not caplog.records
            emit("x")
        (record,) = caplog.records
        assert record.getMessage().startswith("telemetry: Sink is slow: 10 events took longer than 0.001 s")
        assert record.getMessage().endswith("; write to a faster disk")

    def test_every_handler_of_ours_says_so(self):
        handlers = [
            value
            for value in vars(jr.telemetry).values()
            if isinstance(value, type) and "__call__" in vars(value)
        ]
        assert len(handlers) == 9
        assert all("_when_slow" in vars(handler) for handler in handlers)

    def test_closing(self):
        closed = []

        class Sink:
            def __call__(self, event):
                raise ValueError

            def close(self):
                closed.append(self)
                raise OSError("disk is gone")

        sink, heard = Sink(), Heard()
        with pytest.raises(OSError, match="disk is gone"), attached(heard, sink):
            pass
        assert closed == [sink]

    def test_twice_is_refused_and_unknown_is_ignored(self):
        heard = Heard()
        with attached(heard), pytest.raises(ValueError, match="attached already"):
            attach(heard)
        detach(heard)
        with pytest.raises(TypeError, match="not callable"):
            attach(3)

    def test_a_handler_may_emit_attach_and_detach(self):
        heard = Heard()

        def chain(event):
            if event.name == "first":
                attach(heard)
                emit("second")
                detach(heard)

        with attached(chain):
            emit("first")
            emit("third")
        assert [event.name for event in heard] == ["second"]

    def test_threads(self):
        heard = Heard()
        with attached(heard):
            threads = [
                threading.Thread(target=lambda: [emit("x", step=i) for i in range(200)]) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(heard) == 800

    def test_nobody_attached_makes_no_event(self, monkeypatch):
        monkeypatch.setattr(_events, "Event", None)  # would raise
        emit("x")
        log(small()(jnp.ones(3))[1])


class TestLog:
    def test_one_event_a_term_then_the_whole(self):
        heard = Heard()
        _, out = small()(jnp.ones(3))
        with attached(heard):
            log(out, step=5, metrics={"optim/lr": 0.1}, measurements={"duration": 1.0})
        term, whole = heard
        assert (term.name, term.metadata["term"], term.step) == ("regularizer.compute.stop", "l2", 5)
        assert term.measurements == {"value": 3.0, "weight": 0.5, "contribution": 1.5}
        assert whole.name == "custom_loss.stop"
        assert whole.metadata["report"] == out.to_dict()
        assert whole.metadata["metrics"] == out.to_flat_dict() | {"optim/lr": 0.1}
        assert whole.measurements == {"duration": 1.0}

    def test_norms_where_they_are_tracked(self):
        heard = Heard()
        (_, out), _ = small().value_and_grad(jnp.ones(4))
        with attached(heard):
            log(out)
        numbers = heard[0].measurements
        assert numbers["grad_norm"] == 4.0
        assert numbers["grad_norm_weighted"] == 2.0
        assert "duration" not in numbers  # a compiled term has none of its own


class TestClient:
    def test_a_step(self, embedded):
        heard = Heard()
        data = make_data()
        with (
            jr.host.HostRegularizer("facts", lambda data: 2.0, 0.5) as term,
            attached(heard),
        ):
            objective = jr.compose(jr.losses.CrossEntropy(), [term], track_grad_norms=True)
            for _ in range(2):
                jr.client.forward_backward_custom(embedded, data, objective).result()
            jr.client.forward_backward_custom(embedded, data, objective, step=70).result()
        by_step = [
            [event.name for event in heard if event.step == step and not event.name.startswith("compile")]
            for step in (0, 1, 70)
        ]
        assert (
            by_step
            == [
                [
                    "custom_loss.start",
                    "regularizer.compute.start",
                    "regularizer.compute.stop",
                    "custom_loss.stop",
                ]
            ]
            * 3
        )
        start = heard.named("custom_loss.start")[0].metadata
        assert (start["datums"], start["tokens"], start["terms"]) == (4, 24, ("facts",))
        assert heard.named("regularizer.compute.stop")[0].measurements["duration"] >= 0
        assert heard.named("custom_loss.stop")[0].measurements.keys() == {
            "duration",
            "forward",
            "objective",
            "host",
        }

    def test_failures(self):
        heard, data = Heard(), make_data()
        with attached(heard):
            with pytest.raises(jr.client.RequestFailed):
                jr.client.forward_backward_custom(Scripted(forward=ConnectionError("a")), data, sft())
            bad = jr.compose(jr.losses.CrossEntropy(), [dict(name="nan", fn=_nan, weight=1.0)])
            with pytest.raises(jr.client.NonFiniteGradient) as error:
                jr.client.forward_backward_custom(Scripted(), data, bad)
            step = jr.client.forward_backward_custom(Scripted(backward=ConnectionError("b")), data, sft())
            for _ in range(2):
                with pytest.raises(jr.client.RequestFailed):
                    step.result()
        assert error.value.terms == ("nan",)
        assert error.value.datum == 0
        ends = [e.name for e in heard if e.name.startswith(("custom_loss", "server"))]
        assert ends == [
            *["custom_loss.start", "custom_loss.exception"] * 2,
            *["custom_loss.start", "custom_loss.stop", "server.exception"],
        ]
        assert "ConnectionError: b" in str(heard.named("server.exception")[0].metadata["error"])

    def test_a_host_term_that_fails(self):
        heard = Heard()

        def fails(data):
            raise OSError("down")

        with jr.host.HostRegularizer("facts", fails, 1.0, on_error="skip") as term, attached(heard):
            objective = jr.compose(jr.losses.CrossEntropy(), [term])
            jr.client.forward_backward_custom(Slow(), make_data(), objective, step=3)
        (event,) = heard.named("regularizer.compute.exception")
        assert (event.step, event.metadata["term"], event.metadata["on_error"]) == (3, "facts", "skip")
        assert len(heard.named("custom_loss.stop")) == 1

    def test_every_host_term_that_begins_ends(self):
        began = threading.Event()

        async def waits(data):
            began.set()
            await asyncio.sleep(1e6)

        def fails(data, logprobs):
            assert began.wait(60)
            raise OSError("down")

        terms = [
            jr.host.HostRegularizer("waits", waits, 1.0, timeout=None),
            jr.host.HostRegularizer("fails", fails, 1.0),
        ]
        objective = jr.compose(jr.losses.CrossEntropy(), terms)
        heard = Heard()
        with attached(heard), pytest.raises(jr.host.HostTermError, match="down"):
            jr.client.forward_backward_custom(Slow(), make_data(), objective)
        for term in terms:
            term.close()
        ours = [(e.name, e.metadata.get("term")) for e in heard if not e.name.startswith("compile")]
        assert ours == [
            ("custom_loss.start", None),
            ("regularizer.compute.start", "waits"),
            ("regularizer.compute.start", "fails"),
            ("regularizer.compute.exception", "fails"),
            ("regularizer.compute.stop", "waits"),
            ("custom_loss.exception", None),
        ]
        (stop,) = heard.named("regularizer.compute.stop")
        assert stop.metadata["counts"] is False
        assert list(stop.measurements) == ["duration"]


def _nan(x, batch):
    return batch.sum(jnp.sqrt(x))  # of logprobs


class TestCompile:
    def test_what_and_why(self):
        def total(x, batch):  # of this test's own, so that nothing is compiled yet
            return jnp.sum(x)

        def make(fn, norms=False):
            return jr.compose(total, [dict(name="why", fn=fn, weight=0.5)], track_grad_norms=norms)

        heard = Heard()
        with attached(heard):
            objective = make(_square)
            objective(jnp.ones(3))
            objective(jnp.ones(3))
            objective.with_weights({"why": 2.0})(jnp.ones(3))
            make(_square)(jnp.ones(3))
            objective(jnp.ones(4))
            make(lambda x, batch: jnp.sum(x**2))(jnp.ones(4))
        events = heard.named("compile")
        assert [event.metadata["program"] for event in events] == ["jaxreg_call"] * 3
        assert [event.metadata["changed"] for event in events] == [
            ["compiled for the first time"],
            ["x: float32[3] -> float32[4]"],
            ["term 'why': another function than before"],
        ]
        assert all(event.measurements["duration"] > 0 for event in events)

    def test_it_is_told_when_it_begins(self):
        heard = Heard()
        order = []  # ours, and JAX's own word that XLA has compiled something

        def compiled(event, seconds, **about):
            if event.endswith("backend_compile_duration") and "jaxreg" in about["fun_name"]:
                order.append("XLA is done")

        objective = jr.compose(_total, [dict(name="begins", fn=_square, weight=0.5)])
        jax.monitoring.register_event_duration_secs_listener(compiled)
        with attached(heard, lambda event: order.append(event.name)):
            objective.value_and_grad(jnp.ones(3))
            objective.value_and_grad(jnp.ones(3))
            objective.value_and_grad(jnp.ones(4))
            jax.jit(jnp.cumsum)(jnp.ones(17))  # has no objective in it
        jax.monitoring.unregister_event_duration_listener(compiled)
        assert order == ["compile.start", "XLA is done", "compile"] * 2
        for start, stop in (heard[:2], heard[2:]):
            assert start.metadata == stop.metadata
            assert not start.measurements
        assert heard[2].metadata["changed"] == ["x: float32[3] -> float32[4]"]

    def test_inside_a_program_of_ones_own(self):
        heard = Heard()

        objective = jr.compose(lambda x, batch: jnp.sum(x), [dict(name="in", fn=_square, weight=1.0)])

        @jax.jit
        def train_step_of_mine(objective, x):
            y = jax.jit(jnp.cumsum)(x)
            return jax.grad(lambda x: objective(x)[0])(y)

        with attached(heard):
            for n in (5, 5, 6):
                train_step_of_mine(objective, jnp.ones(n))
        for name in ("compile.start", "compile"):
            assert [event.metadata["program"] for event in heard.named(name)] == ["train_step_of_mine"] * 2
        assert heard.named("compile")[1].metadata["changed"] == ["x: float32[5] -> float32[6]"]

    def test_a_dry_run_does_not_hide_it(self):
        heard = Heard()
        objective = jr.compose(_total)
        with attached(heard):
            objective.eval_shape(jnp.ones(9))
            assert not heard
            objective.value_and_grad(jnp.ones(9))
        assert len(heard.named("compile")) == 1


def test_a_step_that_never_began_is_told():
    heard = Heard()
    with attached(heard), pytest.raises(ValueError, match="there is no data"):
        jr.client.forward_backward_custom(Scripted(), [], sft(), step=4)
    assert [(event.name, event.step) for event in heard] == [("custom_loss.exception", 4)]


def test_log_says_what_it_wants():
    objective = jr.compose(lambda x, batch: jnp.sum(x))
    result = objective(jnp.ones(3))
    with jr.telemetry.attached(lambda event: None), pytest.raises(TypeError, match="it is `out`"):
        jr.telemetry.log(result[0])
