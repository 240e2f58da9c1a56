"""Requests keep their order whatever arrives first, and waiting for them blocks nobody."""

import asyncio
import threading
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from clients import Recorder, Scripted, Slow, make_data, minus_ones, sft

import jaxreg as jr

ADAM = jr.client.AdamParams(learning_rate=1e-2)


def test_an_optimizer_step_issued_afterwards_comes_after_the_backward():
    client = Slow()
    future = jr.client.forward_backward_custom(client, make_data(), sft())
    client.optim_step(ADAM)
    assert client.order == ["forward", "backward", "optim_step"]
    client.futures["optim_step"].set_result(None)  # its reply first
    assert not future.done()
    with pytest.raises(jr.client.RequestTimedOut) as caught:
        future.result(timeout=0.01)
    assert caught.value.gradient_applied == "maybe"
    client.futures["backward"].set_result(minus_ones(client.backward_data))
    assert future.result().drift.max == 0
    assert client.order.count("backward") == 1


def test_two_steps_in_flight_keep_their_own_results(embedded):
    one, two = make_data(1), make_data(2, lengths=(4, 4))
    futures = [jr.client.forward_backward_custom(embedded, data, sft()) for data in (one, two)]
    lengths = [[len(lp) for lp in future.result().logprobs] for future in reversed(futures)]
    assert lengths == [[4, 4], [5, 9, 3, 7]]


def test_inside_an_event_loop_nothing_blocks(embedded):
    class Late:
        """A forward that returns only once the event loop has gone round ten times meanwhile."""

        def __init__(self, client):
            self.client, self.under_way, self.rounds = client, threading.Event(), threading.Event()

        def forward(self, data, loss_fn):
            self.under_way.set()
            assert self.rounds.wait(60), "the loop stood still"
            return self.client.forward(data, loss_fn)

        def forward_backward(self, data, loss_fn):
            return self.client.forward_backward(data, loss_fn)

    client = Late(embedded)

    async def rounds():
        await asyncio.to_thread(client.under_way.wait, 60)
        for _ in range(10):
            await asyncio.sleep(0)
        client.rounds.set()

    async def main():
        going = asyncio.create_task(rounds())
        future = await jr.client.forward_backward_custom_async(client, make_data(), sft())
        await going
        return await future

    assert asyncio.run(main()).output.regularizers["kl"].value > 0


def test_the_blocking_call_refuses_to_block_an_event_loop():
    async def main():
        jr.client.forward_backward_custom(Scripted(), make_data(), sft())

    with pytest.raises(RuntimeError, match="forward_backward_custom_async"):
        asyncio.run(main())


def test_cancelled_before_the_backward_nothing_is_sent(embedded):
    client, asked = Recorder(embedded), threading.Event()

    async def main():
        pending = asyncio.get_running_loop().create_future()
        original = embedded.forward

        def forward(data, loss_fn):
            asked.set()
            return pending

        embedded.forward = forward
        task = asyncio.create_task(jr.client.forward_backward_custom_async(client, make_data(), sft()))
        assert await asyncio.to_thread(asked.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        embedded.forward = original

    asyncio.run(main())
    assert "forward_backward" not in client.names
    # and the client is as good as before
    assert jr.client.forward_backward_custom(client, make_data(), sft()).result().output.loss_total > 0


def test_cancelling_does_not_wait_for_a_request_that_is_being_handed_over():
    began, release, handed_over = threading.Event(), threading.Event(), threading.Event()

    class SlowToSend(Scripted):
        def forward_backward(self, data, loss_fn):
            began.set()
            release.wait(60)
            handed_over.set()
            return super().forward_backward(data, loss_fn)

    async def main():
        step = jr.client.forward_backward_custom_async(SlowToSend(), make_data(), sft())
        task = asyncio.create_task(step)
        assert await asyncio.to_thread(began.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert not handed_over.is_set()
        release.set()
        return caught.value

    assert "may be applied" in asyncio.run(main()).__notes__[0]


def _log_of_minus(x, batch):
    return batch.mean(jnp.log(x + 1.0))  # at −1: −inf, with an infinite slope


STEPS = {
    "it goes well": lambda: (Scripted(), make_data(), sft(), {}),
    "one request": lambda: (
        Scripted(),
        make_data(),
        sft(),
        {"logprobs": [-np.ones(n) for n in (5, 9, 3, 7)]},
    ),
    "bad data": lambda: (Scripted(), [], sft(), {}),
    "logprobs for other data": lambda: (Scripted(), make_data(), sft(), {"logprobs": []}),
    "the forward fails": lambda: (Scripted(forward=OSError("down")), make_data(), sft(), {}),
    "the backward fails": lambda: (Scripted(backward=OSError("down")), make_data(), sft(), {}),
    "an infinite gradient": lambda: (Scripted(), make_data(), jr.compose(_log_of_minus), {}),
}


@pytest.mark.parametrize("case", STEPS)
def test_blocking_and_in_a_loop_a_step_sends_and_tells_the_same(case):
    def blocking(client, data, objective, options):
        return jr.client.forward_backward_custom(client, data, objective, **options).result()

    async def in_a_loop(client, data, objective, options):
        return await (await jr.client.forward_backward_custom_async(client, data, objective, **options))

    def what_happens(run):
        client, *rest = STEPS[case]()
        heard, error = [], None
        with jr.telemetry.attached(heard.append):
            try:
                run(client, *rest)
            except Exception as raised:
                error = raised
        told = [
            (e.name, e.step, sorted(e.measurements), sorted(e.metadata), repr(e.metadata.get("error")))
            for e in heard
            if not e.name.startswith("compile")
        ]
        weights = [
            (name, [datum.loss_fn_inputs["weights"].tolist() for datum in data])
            for name, data in client.requests
        ]
        return told, weights, repr(error)

    here = what_happens(blocking)
    assert here == what_happens(lambda *arguments: asyncio.run(in_a_loop(*arguments)))
    assert here[0][0][1] == 0  # it is this client's first step


def test_a_drift_is_reported_at_the_callers_line():
    stale = [np.full(n, -2.0, np.float32) for n in (5, 9, 3, 7)]

    async def in_a_loop():
        future = await jr.client.forward_backward_custom_async(Scripted(), make_data(), sft(), logprobs=stale)
        await future

    for run in (
        lambda: jr.client.forward_backward_custom(Scripted(), make_data(), sft(), logprobs=stale).result(),
        lambda: asyncio.run(in_a_loop()),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        assert [warning.filename for warning in caught if "nats" in str(warning.message)] == [__file__]


def test_cancelled_while_a_term_computes_nothing_is_sent_and_it_is_told_once():
    began, release, computed = threading.Event(), threading.Event(), threading.Event()

    def term(data, logprobs):
        began.set()
        assert release.wait(60)
        computed.set()
        return 1.0

    client, heard = Scripted(), []

    async def main(objective):
        step = jr.client.forward_backward_custom_async(client, make_data(), objective)
        task = asyncio.create_task(step)
        assert await asyncio.to_thread(began.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        release.set()
        return caught.value

    with jr.host.HostRegularizer("slow", term, 1.0) as slow, jr.telemetry.attached(heard.append):
        error = asyncio.run(main(jr.compose(jr.losses.CrossEntropy(), [slow])))  # it waits for its threads
    assert not getattr(error, "__notes__", [])
    assert [name for name, _ in client.requests] == ["forward"]
    ends = [event for event in heard if event.name in ("custom_loss.stop", "custom_loss.exception")]
    assert [event.metadata["error"] for event in ends] == [error]
