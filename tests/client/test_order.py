"""Requests keep their order whatever arrives first, and waiting for them blocks nobody."""

import asyncio
import threading

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
