"""Host terms: right, concurrent, bounded, and gone when they should be."""

import asyncio
import concurrent.futures
import functools
import gc
import logging
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import Recorder, Slow, make_data
from host_functions import count, dies, exits, raises, sleeps, squares, unpicklable

import jaxreg as jr
from jaxreg.host import HostRegularizer, HostTermError, HostTermTimeout, runners
from jaxreg.host.calls import HostCalls

LIKE = [np.full(3, -1.0, np.float32), np.full(2, -2.0, np.float32)]
DATA = ["first", "second"]


def run(term, data=DATA, logprobs=LIKE):
    """One step of one term."""
    calls = HostCalls([term], LIKE)
    calls.start(data, logprobs)
    return calls.collect()[term.name]


def ours():
    """The threads of host terms."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxreg-host-")]


def eventually(holds):
    """Wait until it holds, for a minute at most."""
    for _ in range(1200):
        if holds():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    gc.collect()
    assert eventually(lambda: not ours()), ours()


async def squares_async(data, logprobs):
    await asyncio.sleep(0)
    return squares(data, logprobs)


def compiled_squares(x, batch):
    return jnp.sum(jnp.square(batch.where(x)))


def objective(term, weight=0.5, **norms):
    return jr.compose(
        jr.losses.CrossEntropy(),
        [dict(name="kl", fn=jr.regularizers.KL(), weight=0.2), term],
        track_grad_norms=jr.GradNorms(**norms),
    )


class TestRight:
    @pytest.mark.parametrize("fn", [squares, squares_async])
    @pytest.mark.parametrize("per_datum", [False, True])
    def test_remote_equals_a_compiled_term(self, embedded, fn, per_datum):
        data, client = make_data(), Recorder(embedded)
        pair = [
            HostRegularizer("squares", fn, 0.5),
            dict(name="squares", fn=compiled_squares, weight=0.5),
        ]
        got, want = (
            jr.client.forward_backward_custom(client, data, objective(term, per_datum=per_datum))
            for term in pair
        )
        got_out, want_out = got.output, want.output
        assert list(got_out.regularizers) == list(want_out.regularizers) == ["kl", "squares"]
        custom = dict(got_out.regularizers["squares"].custom)
        assert set(custom) == {"pid", "host_seconds", "host_age", "host_trains"}
        assert custom["host_trains"] == 1
        assert custom["host_age"] == 0
        got_out.regularizers["squares"].custom.clear()
        chex.assert_trees_all_close(got_out, want_out, rtol=2e-6)
        for a, b in zip(*client.sent("forward_backward"), strict=True):
            np.testing.assert_allclose(
                a.loss_fn_inputs["weights"], b.loss_fn_inputs["weights"], rtol=2e-6, atol=1e-7
            )
        pair[0].close()

    def test_the_gradient_that_is_sent_has_it(self):
        data, client = make_data(), Slow()
        with HostRegularizer("squares", squares, 0.5) as term:
            jr.client.forward_backward_custom(
                client, data, jr.compose(lambda x, batch: 0.0 * jnp.sum(x), [term])
            )
        for datum in client.backward_data:  # logprobs of −1: d/dlp ½·lp² ·2 = −1, sent with a minus
            np.testing.assert_array_equal(datum.loss_fn_inputs["weights"], 1.0)

    def test_a_jitted_loop_equals_a_compiled_term(self):
        batch = jr.TokenBatch.pack([d.loss_fn_inputs for d in make_data()])
        x = jnp.asarray(-np.random.default_rng(0).uniform(0.1, 3, batch.shape).astype(np.float32))
        results = []
        with HostRegularizer("squares", squares, 0.5) as term:
            for one in (term, dict(name="squares", fn=compiled_squares, weight=0.5)):
                step = jax.jit(lambda o, x: o.value_and_grad(x, batch))
                (loss, out), grads = step(objective(one), x)
                results.append((loss, out.regularizers["squares"].grad_norm, out.total_grad_norm, grads))
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)

    def test_a_jitted_loop_with_a_model_and_a_pytree(self):
        def fn(data, outputs):
            return float(np.sum(outputs["y"] ** 2)), {"n": len(data["y"])}, {"y": 2 * outputs["y"]}

        def forward(params, batch):
            return {"y": params["w"] * batch["y"]}

        with HostRegularizer("fn", fn, 1.0, metrics=("n",)) as term:
            for norms in ("outputs", "params"):
                o = jr.compose(
                    lambda out, batch: 0.0 * jnp.sum(out["y"]),
                    [term],
                    forward=forward,
                    track_grad_norms=jr.GradNorms(wrt=norms),
                )
                (_, out), grads = o.value_and_grad({"w": jnp.float32(3.0)}, {"y": jnp.arange(3.0)})
                assert grads["w"].item() == 2 * 3.0 * 5.0  # d/dw Σ (w·y)² = 2·w·Σy²
                assert out.regularizers["fn"].custom["n"].item() == 3

    def test_bfloat16_and_vmap_and_a_mask_of_minus_infinity(self):
        with HostRegularizer(
            "n", lambda data, x: (float(np.isfinite(x).sum()), {}, np.ones_like(x)), 1.0
        ) as t:
            fn = t.as_spec().fn
            x = jnp.array([[-jnp.inf, -1.0], [-2.0, -3.0]], jnp.bfloat16)
            (value, _), slope = jax.vmap(jax.value_and_grad(fn, has_aux=True), (0, None))(x, {})
        assert value.tolist() == [1.0, 2.0]
        assert slope.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(slope, np.float32), 1.0)

    def test_without_a_gradient_it_counts_and_moves_nothing(self, embedded):
        with HostRegularizer("count", count, 0.5) as term:
            step = jr.client.forward_backward_custom(embedded, make_data(), objective(term))
            out = step.output.regularizers["count"]
        assert out.contribution == 2.0
        assert out.grad_norm == 0.0
        assert out.custom["host_trains"] == 0
        assert "reg/count/host_age" in step.result().metrics

    def test_a_gradient_without_logprobs(self, embedded):
        def fn(data):
            return 1.0, {}, [np.ones(len(d.loss_fn_inputs["target_tokens"])) for d in data]

        with HostRegularizer("fn", fn, 0.5) as term:
            out = jr.client.forward_backward_custom(embedded, make_data(), objective(term)).output
        np.testing.assert_allclose(out.regularizers["fn"].grad_norm, np.sqrt(5 + 9 + 3 + 7))


class TestWeights:
    def test_switches_and_schedules(self, embedded):
        client, data = embedded, make_data()
        with HostRegularizer("count", count, optax.linear_schedule(0.0, 1.0, 4)) as term:
            o = objective(term)
            state, seen = o.init(), []
            for _ in range(3):
                out = jr.client.forward_backward_custom(client, data, o, state=state).output
                state = out.state
                seen.append(float(out.regularizers["count"].contribution))
            held = o.with_weights({"count": 2.0})
            held_out = jr.client.forward_backward_custom(client, data, held, state=state).output
            off = jr.client.forward_backward_custom(client, data, o.without("count"), state=state).output
        assert seen == [0.0, 1.0, 2.0]
        assert held_out.regularizers["count"].contribution == 8.0
        assert off.regularizers["count"].value == 4.0
        assert off.regularizers["count"].contribution == 0.0

    def test_equal_objectives_share_the_compiled_part(self):
        from jaxreg.host.part import part

        with HostRegularizer("count", count, 1.0) as term:
            kl = jr.regularizers.KL()
            one, two = (
                jr.compose(jr.losses.CrossEntropy(), [dict(name="kl", fn=kl, weight=w), term])
                for w in (0.1, 0.2)
            )
            assert part(one)[0].plan is part(two)[0].plan
            assert part(one)[0].names == ("kl",)
            assert part(one)[1] == (term,)


class TestTogether:
    def test_all_terms_of_a_step_run_at_once(self):
        barrier = threading.Barrier(5, timeout=60)

        def fn(data):
            barrier.wait()  # passes when all five are here
            return 0.0

        async def fn_async(data):
            await asyncio.to_thread(barrier.wait)
            return 0.0

        terms = [HostRegularizer(f"t{i}", fn_async if i % 2 else fn, 1.0) for i in range(5)]
        calls = HostCalls(terms, LIKE)
        calls.start(DATA)
        assert list(calls.collect()) == [f"t{i}" for i in range(5)]
        for term in terms:
            term.close()

    def test_data_only_terms_start_while_the_forward_is_under_way(self):
        began, arrived = threading.Event(), threading.Event()

        class Waits(Slow):
            def forward(self, data, loss_fn):
                answer = super().forward(data, loss_fn)
                late = concurrent.futures.Future()

                def send():
                    assert began.wait(60)
                    arrived.set()
                    late.set_result(answer.result())

                threading.Thread(target=send, daemon=True).start()
                return late

        def early(data):
            began.set()
            return float(arrived.wait(60))

        def later(data, logprobs):
            return float(arrived.is_set())

        terms = [HostRegularizer("early", early, 1.0), HostRegularizer("later", later, 1.0)]
        out = jr.client.forward_backward_custom(
            Waits(), make_data(), jr.compose(jr.losses.CrossEntropy(), terms)
        ).output
        assert out.regularizers["early"].value == out.regularizers["later"].value == 1.0

    @pytest.mark.parametrize(
        ("fn", "takes"),
        [
            (lambda data: 1.0, False),
            (lambda data, logprobs: 1.0, True),
            (lambda data, limit=3: float(limit), False),
            (lambda data, logprobs=None: 1.0, True),
            (lambda data, *, limit=3: 1.0, False),
            (lambda *arguments: 1.0, True),
            (functools.partial(lambda limit, data: 1.0, 3), False),
        ],
    )
    def test_the_signature_says_what_it_takes(self, fn, takes):
        assert HostRegularizer("fn", fn, 1.0).takes_logprobs is takes

    def test_a_session_of_the_loop_serves_every_step(self):
        loops = []

        async def fn(data):
            loops.append(asyncio.get_running_loop())
            return 0.0

        with HostRegularizer("fn", fn, 1.0) as term:
            for _ in range(3):
                run(term)
        assert len(set(loops)) == 1

    def test_a_process_is_kept_and_computes_elsewhere(self):
        import os

        with HostRegularizer("squares", squares, 1.0, run="process", timeout=60) as term:
            results = [run(term) for _ in range(3)]
        assert {r.metrics["pid"] for r in results} != {os.getpid()}
        assert len({r.metrics["pid"] for r in results}) == 1
        assert results[0].value == 3 * 1.0 + 2 * 4.0
        np.testing.assert_array_equal(results[0].gradient[1], [-4.0, -4.0])


GARBAGE = [
    (None, "is a return missing"),
    ("1.0", "one real number, got str"),
    (True, "one real number, got bool"),
    (float("nan"), "its value is nan"),
    (float("inf"), "its value is inf"),
    (np.ones(3), r"one real number, got ndarray of shape \(3,\)"),
    (1j, "one real number"),
    (object(), "one real number, got object"),
    ((1.0,), "a tuple of 1"),
    ((1.0, 2.0), "metrics are a mapping"),
    ((1.0, {"": 1.0}), "a string that is not empty"),
    ((1.0, {"value": 1.0}), "would collide"),
    ((1.0, {"host_age": 1.0}), "would collide"),
    ((1.0, {"m": "x"}), "metric 'm' is one real number"),
    ((1.0, {}, 3.0), "one array a datum"),
    ((1.0, {}, [np.ones(3)]), "1 arrays for 2 datums"),
    ((1.0, {}, [np.ones(3), np.ones(3)]), r"datum 1 has shape \(3,\), but the logprobs there have \(2,\)"),
    ((1.0, {}, [np.ones(3), np.array([1.0, np.nan])]), r"datum 1 is nan at \[1\]"),
    ((1.0, {}, [np.ones(3), ["a", "b"]]), "array of real numbers"),
    ((1.0, {}, [np.ones(3), [[1.0], [1.0, 2.0]]]), "no number or array"),
]


class TestBadInput:
    @pytest.mark.parametrize(("result", "message"), GARBAGE)
    def test_garbage_is_refused_by_name(self, result, message):
        with (
            HostRegularizer("kb", lambda data: result, 1.0) as term,
            pytest.raises(HostTermError, match=message) as e,
        ):
            run(term)
        assert "'kb'" in str(e.value)
        assert e.value.term == "kb"

    def test_a_coroutine_from_a_plain_function(self):
        async def inner():
            return 1.0

        with (
            HostRegularizer("kb", lambda data: inner(), 1.0) as term,
            pytest.raises(HostTermError, match="async def"),
        ):
            run(term)

    @pytest.mark.parametrize(
        ("fn", "message"), [(raises, "ValueError: no such fact"), (exits, "SystemExit: enough")]
    )
    @pytest.mark.parametrize("where", ["thread", "process", "coroutine"])
    def test_what_it_raises_is_the_cause(self, fn, message, where):
        async def awaited(data, fn=fn):
            fn(data)

        fn, where = (awaited, None) if where == "coroutine" else (fn, where)
        with (
            HostRegularizer("kb", fn, 1.0, run=where) as term,
            pytest.raises(HostTermError, match=message) as error,
        ):
            run(term)
        assert error.value.__cause__ is not None

    def test_a_process_that_is_killed_is_replaced(self):
        with HostRegularizer("kb", dies, 1.0, run="process") as term:
            for _ in range(2):
                with pytest.raises(HostTermError, match="exit code -9"):
                    run(term)

    def test_a_process_that_never_returns_is_killed(self):
        with HostRegularizer("kb", sleeps, 1.0, run="process", timeout=0.2) as term:
            with pytest.raises(HostTermTimeout, match=r"timeout of 0.2 s .*killed"):
                run(term)
            assert eventually(lambda: not term.runtime.runner._busy)

    def test_what_cannot_be_pickled(self):
        with pytest.raises(TypeError, match=r"host term 'kb': fn cannot be pickled.*top level of a module"):
            HostRegularizer("kb", lambda data: 1.0, 1.0, run="process")
        with (
            HostRegularizer("kb", unpicklable, 1.0, run="process") as term,
            pytest.raises(HostTermError, match="pickle"),
        ):
            run(term)
        with HostRegularizer("kb", count, 1.0, run="process") as term:
            with pytest.raises(HostTermError, match="pickle"):
                run(term, data=[lambda: None])
            assert run(term).value == 2.0  # and the process is as good as before

    def test_a_thread_that_never_returns_keeps_its_place_and_no_other(self):
        release = threading.Event()

        def hangs(data):
            release.wait()
            return 1.0

        messages = []
        with HostRegularizer("kb", hangs, 1.0, timeout=1.0, max_concurrency=2) as term:
            try:
                for _ in range(5):
                    with pytest.raises(HostTermTimeout) as error:
                        run(term)
                    messages.append(str(error.value))
                assert eventually(lambda: len(ours()) == 2)
            finally:
                release.set()
            assert eventually(lambda: not ours())
            assert run(term).value == 1.0
        assert all("cannot be stopped" in message for message in messages[:2])
        assert all("2 earlier calls still run, and max_concurrency=2" in m for m in messages[2:])

    def test_a_coroutine_that_never_returns_is_cancelled(self, monkeypatch):
        monkeypatch.setattr("jaxreg.host.runners.GRACE", 60.0)
        seen = []

        async def hangs(data):
            try:
                await asyncio.sleep(1e6)
            finally:
                seen.append("cancelled")

        with HostRegularizer("kb", hangs, 1.0, timeout=1.0, max_concurrency=1) as term:
            for _ in range(3):
                with pytest.raises(HostTermTimeout, match="it was cancelled"):
                    run(term)
        assert seen == ["cancelled"] * 3

    def test_a_coroutine_that_blocks_its_loop(self):
        release = threading.Event()

        async def blocks(data):
            release.wait()
            return 1.0

        with HostRegularizer("kb", blocks, 1.0, timeout=1.0) as term:
            try:
                with pytest.raises(HostTermTimeout, match="blocks its event loop.*declare it with `def`"):
                    run(term)
                with pytest.raises(HostTermError, match="still blocks"):
                    run(term)
            finally:
                release.set()
            assert eventually(lambda: term.runtime.runner._answered.is_set())
            assert run(term).value == 1.0

    def test_one_failure_cancels_the_others(self):
        began, cancelled = threading.Event(), threading.Event()

        async def waits(data):
            began.set()
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        def fails(data):
            assert began.wait(60)
            raise ValueError("no such fact")

        terms = [HostRegularizer("waits", waits, 1.0, timeout=None), HostRegularizer("kb", fails, 1.0)]
        calls = HostCalls(terms, LIKE)
        calls.start(DATA)
        with pytest.raises(HostTermError, match="no such fact"):
            calls.collect()
        assert cancelled.wait(60)
        terms[0].close()

    @pytest.mark.parametrize("end", ["cancel", "close"])
    def test_a_loop_that_comes_late_leaves_no_call_behind(self, monkeypatch, end):
        monkeypatch.setattr("jaxreg.host.runners.GRACE", 0.0)
        go, began, run_loop = threading.Event(), [], runners._run_loop
        monkeypatch.setattr(runners, "_run_loop", lambda loop: (go.wait(60), run_loop(loop)))

        async def waits(data):
            began.append(data)
            await asyncio.sleep(1e6)

        term = HostRegularizer("waits", waits, 1.0, timeout=None)
        calls = HostCalls([term], LIKE)
        calls.start(DATA)
        ((call, _, _),) = calls._calls.values()
        calls.cancel() if end == "cancel" else term.close()
        go.set()
        assert eventually(call.done)
        term.close()
        assert eventually(lambda: not ours())
        if end == "cancel":
            assert began == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"name": "a/b"}, "no '/'"),
            ({"fn": 3}, "function of"),
            ({"fn": lambda: 1.0}, "does not fit"),
            ({"fn": lambda a, b, c: 1.0}, "does not fit"),
            ({"weight": -1.0}, "≥ 0"),
            ({"run": "fork"}, "'coroutine', 'thread' or 'process'"),
            ({"run": "coroutine"}, "no `async def`"),
            ({"fn": squares_async, "run": "thread"}, "is an `async def`"),
            ({"timeout": 0}, "timeout"),
            ({"timeout": float("inf")}, "timeout"),
            ({"max_concurrency": 0}, "max_concurrency"),
            ({"on_error": "ignore"}, "on_error"),
            ({"metrics": "n"}, "sequence of names"),
            ({"metrics": ("value",)}, "would collide"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        with pytest.raises((TypeError, ValueError), match=message):
            HostRegularizer(**({"name": "kb", "fn": count, "weight": 1.0} | change))

    def test_a_jitted_loop_says_which_term_failed(self):
        with (
            HostRegularizer("kb", raises, 1.0) as term,
            pytest.raises(Exception, match="host term 'kb'.*no such fact"),
        ):
            jax.block_until_ready(jr.compose(lambda x, b: jnp.sum(x), [term]).value_and_grad(jnp.ones(3)))

    def test_a_metric_that_is_promised_and_missing(self):
        with (
            HostRegularizer("kb", count, 1.0, metrics=("hits",)) as term,
            pytest.raises(Exception, match="metrics= names"),
        ):
            jax.block_until_ready(
                jr.compose(lambda x, b: jnp.sum(x), [term])(jnp.ones(3), {"a": jnp.ones(2)})
            )


class Flaky:
    """Good, then bad, then good, ...: what each call does is written down."""

    def __init__(self, script):
        self.script = iter(script)

    def __call__(self, data, logprobs):
        value = next(self.script)
        if value is None:
            raise ConnectionError("refused")
        return value, {"hits": value}, [np.ones_like(lp) for lp in logprobs]


class TestOnError:
    def test_skip(self, caplog, embedded):
        with HostRegularizer("kb", Flaky([3.0, None, 4.0]), 1.0, on_error="skip") as term:
            outs = [
                jr.client.forward_backward_custom(embedded, make_data(), objective(term)).output
                for _ in range(3)
            ]
        terms = [out.regularizers["kb"] for out in outs]
        assert [float(t.value) for t in terms] == [3.0, 0.0, 4.0]
        assert [float(t.custom["host_age"]) for t in terms] == [0.0, -1.0, 0.0]
        assert "hits" not in terms[1].custom
        assert terms[1].grad_norm == 0.0
        assert "ConnectionError: refused" in caplog.text
        assert "left out" in caplog.text

    def test_last_has_a_value_and_no_gradient(self):
        with HostRegularizer("kb", Flaky([None, 3.0, None, None, 4.0]), 1.0, on_error="last") as term:
            results = [run(term) for _ in range(5)]
        assert [r.value for r in results] == [0.0, 3.0, 3.0, 3.0, 4.0]
        assert [r.metrics["host_age"] for r in results] == [-1, 0, 1, 2, 0]
        assert [r.gradient is not None for r in results] == [False, True, False, False, True]

    def test_failures_are_counted_and_not_all_logged(self, caplog):
        caplog.set_level(logging.WARNING)
        with HostRegularizer("kb", raises, 1.0, on_error="skip") as term:
            for _ in range(30):
                run(term)
        assert len(caplog.records) == 2
        assert "failure 10 of" in caplog.records[-1].getMessage()

    @pytest.mark.parametrize("inside", [False, True], ids=["beside the compiled pass", "inside it"])
    def test_raise_sends_nothing(self, inside):
        client = Slow()
        with (
            HostRegularizer("kb", raises, 1.0) as term,
            pytest.raises(Exception, match="no such fact") as error,
        ):
            jr.client.forward_backward_custom(client, make_data(), objective(term, gramian=inside))
        assert inside or isinstance(error.value, HostTermError)
        assert client.order == ["forward"]
        assert any("No gradient was sent" in note for note in error.value.__notes__)


class TestCancelling:
    def test_an_async_step_cancels_its_host_terms(self):
        began, ended = threading.Event(), threading.Event()

        async def waits(data):
            began.set()
            try:
                await asyncio.sleep(1e6)
            finally:
                ended.set()

        client = Slow()
        term = HostRegularizer("waits", waits, 1.0, timeout=None)

        async def main():
            step = asyncio.ensure_future(
                jr.client.forward_backward_custom_async(client, make_data(), objective(term))
            )
            await asyncio.to_thread(began.wait, 60)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert await asyncio.to_thread(ended.wait, 60)

        asyncio.run(main())
        assert "backward" not in client.order
        term.close()

    def test_a_forward_that_fails_cancels_them(self):
        began, ended = threading.Event(), threading.Event()

        async def waits(data):
            began.set()
            try:
                await asyncio.sleep(1e6)
            finally:
                ended.set()

        class Fails(Slow):
            def forward(self, data, loss_fn):
                return concurrent.futures.ThreadPoolExecutor(1).submit(self._fail)

            def _fail(self):
                assert began.wait(60)
                raise ConnectionError("gone")

        with HostRegularizer("waits", waits, 1.0) as term:
            with pytest.raises(jr.client.RequestFailed):
                jr.client.forward_backward_custom(Fails(), make_data(), objective(term))
            assert ended.wait(60)

    def test_dropping_a_term_ends_its_loop(self):
        term = HostRegularizer("kb", functools.partial(squares_async), 1.0)
        run(term)
        assert len(ours()) == 1
        del term
        gc.collect()
        assert eventually(lambda: not ours())
