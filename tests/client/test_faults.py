"""A server that fails, lies or falls silent: a typed error that says what became of the gradient."""

import asyncio
import concurrent.futures
import types

import jax.numpy as jnp
import numpy as np
import pytest
from clients import Scripted, make_data, minus_ones, now, reply, sft

import jaxreg as jr

LENGTHS = (5, 9, 3, 7)


def ones(*lengths, at=None, value=None):
    """An answer of −1 everywhere, but for one value at (datum, token)."""
    arrays = [-np.ones(n, np.float32) for n in lengths]
    if at is not None:
        arrays[at[0]][at[1]] = value
    return reply(arrays)


class StatusError(Exception):
    """As SDKs have it."""

    def __init__(self, status_code):
        super().__init__("the server said no")
        self.status_code = status_code


BAD_REPLIES = {
    "3 outputs for 4 datums": ones(*LENGTHS[:3]),
    "5 outputs for 4 datums": ones(*LENGTHS, 2),
    r"output 1: 'logprobs' has shape \(8,\), but datum 1": ones(5, 8, 3, 7),
    r"output 0: .*another order": ones(9, 5, 3, 7),
    r"output 2: a logprob is nan at \[1\]": ones(*LENGTHS, at=(2, 1), value=np.nan),
    r"output 3: a logprob is -inf at \[6\]": ones(*LENGTHS, at=(3, 6), value=-np.inf),
    "output 0 has no 'logprobs'": types.SimpleNamespace(loss_fn_outputs=[{}] * 4, metrics={}),
    "no loss_fn_outputs": {"detail": "Not Found"},
    "no array of numbers": types.SimpleNamespace(loss_fn_outputs=[{"logprobs": ["a", "b"]}] * 4, metrics={}),
}
FAILURES = {
    "StatusError (status 400)": StatusError(400),
    "StatusError (status 503)": StatusError(503),
    "ConnectionResetError": ConnectionResetError("reset by peer"),
    "OSError": OSError("broken pipe"),
}


def step(client, **options):
    return jr.client.forward_backward_custom(client, make_data(), sft(), **options)


def step_async(client):
    async def main():
        return await (await jr.client.forward_backward_custom_async(client, make_data(), sft()))

    return asyncio.run(main())


@pytest.mark.parametrize("run", [lambda c: step(c).result(), step_async], ids=["sync", "async"])
@pytest.mark.parametrize("message", BAD_REPLIES)
def test_a_bad_reply_to_the_forward_sends_no_gradient(message, run):
    client = Scripted(forward=BAD_REPLIES[message])
    with pytest.raises(jr.client.BadReply, match=message) as caught:
        run(client)
    assert (caught.value.step, caught.value.gradient_applied) == ("forward", "no")
    assert [name for name, _ in client.requests] == ["forward"]


@pytest.mark.parametrize("message", BAD_REPLIES)
def test_a_bad_reply_to_the_backward_says_that_the_gradient_is_applied(message):
    client = Scripted(backward=BAD_REPLIES[message])
    future = step(client)
    for _ in range(2):  # the same error every time, and nothing is sent again
        with pytest.raises(jr.client.BadReply, match=message) as caught:
            future.result()
        assert (caught.value.step, caught.value.gradient_applied) == ("backward", "yes")
    assert [name for name, _ in client.requests] == ["forward", "forward_backward"]


@pytest.mark.parametrize("run", [lambda c: step(c).result(), step_async], ids=["sync", "async"])
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize(("where", "applied"), [("forward", "no"), ("backward", "maybe")])
def test_a_failed_request_says_which_and_what_became_of_the_gradient(where, applied, name, run):
    client = Scripted(**{where: FAILURES[name]})
    with pytest.raises(jr.client.RequestFailed) as caught:
        run(client)
    assert name in str(caught.value)
    assert (caught.value.step, caught.value.gradient_applied) == (where, applied)
    assert caught.value.__cause__ is FAILURES[name]
    names = [called for called, _ in client.requests]
    assert names == (["forward"] if where == "forward" else ["forward", "forward_backward"])


def test_a_request_that_cannot_even_be_made():
    class Broken(Scripted):
        def forward_backward(self, data, loss_fn):
            raise ValueError("No data provided")

    with pytest.raises(jr.client.RequestFailed, match="No data provided") as caught:
        step(Broken())
    assert caught.value.gradient_applied == "maybe"  # it may have failed at reading an answer


class Silent:
    """Never answers one of the two requests."""

    def __init__(self, which):
        self.which, self.pending, self.calls = which, concurrent.futures.Future(), []

    def forward(self, data, loss_fn):
        self.calls.append("forward")
        return self.pending if self.which == "forward" else now(minus_ones(data))

    def forward_backward(self, data, loss_fn):
        self.calls.append("backward")
        return self.pending if self.which == "backward" else now(minus_ones(data))


def test_timeouts():
    client = Silent("forward")
    with pytest.raises(jr.client.RequestTimedOut, match=r"no answer within 0\.05 s") as caught:
        step(client, timeout=0.05)
    assert (caught.value.step, caught.value.gradient_applied, client.calls) == ("forward", "no", ["forward"])

    client = Silent("backward")
    future = step(client)
    with pytest.raises(jr.client.RequestTimedOut) as caught:
        future.result(timeout=0.05)
    assert (caught.value.step, caught.value.gradient_applied) == ("backward", "maybe")
    client.pending.set_result(ones(*LENGTHS))
    assert future.result().output.loss_total > 0
    assert client.calls == ["forward", "backward"]


def test_timeouts_in_an_event_loop():
    async def main():
        client = Silent("forward")
        with pytest.raises(jr.client.RequestTimedOut):
            await jr.client.forward_backward_custom_async(client, make_data(), sft(), timeout=0.05)
        client = Silent("backward")
        future = await jr.client.forward_backward_custom_async(client, make_data(), sft())
        with pytest.raises(jr.client.RequestTimedOut):
            await future.result_async(timeout=0.05)
        client.pending.set_result(ones(*LENGTHS))
        return client, await future

    client, result = asyncio.run(main())
    assert result.drift.max == 0
    assert client.calls == ["forward", "backward"]


def test_giving_up_on_a_result_does_not_take_the_request_back():
    async def main():
        client = Silent("backward")
        future = await jr.client.forward_backward_custom_async(client, make_data(), sft())
        waiting = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        client.pending.set_result(ones(*LENGTHS))
        return await future

    assert asyncio.run(main()).output.loss_total > 0


def test_a_gradient_that_is_not_finite_names_the_term_and_is_not_sent():
    def log_of_minus(x, batch):
        return batch.mean(jnp.log(x + 1.0))  # at −1: −inf, with an infinite slope

    objective = jr.compose(
        jr.losses.CrossEntropy(),
        [
            dict(name="l1", fn=jr.regularizers.L1(), weight=0.1),
            dict(name="suspect", fn=log_of_minus, weight=0.1),
        ],
        track_grad_norms=True,
    )
    client = Scripted()
    with pytest.raises(
        jr.client.NonFiniteGradient, match=r"datum 0 at \[0\] is .*inf.*term 'suspect'"
    ) as caught:
        jr.client.forward_backward_custom(client, make_data(), objective)
    assert "l1" not in str(caught.value)
    assert (caught.value.step, caught.value.gradient_applied) == ("objective", "no")
    assert [name for name, _ in client.requests] == ["forward"]
    # the client stays usable, and the ablation that the error calls for works
    result = jr.client.forward_backward_custom(client, make_data(), objective.without("suspect")).result()
    assert np.isfinite(result.output.total_grad_norm)


def test_a_term_that_fails_sends_nothing():
    def broken(x, batch):
        raise RuntimeError("a bug of the user's")

    client = Scripted()
    with pytest.raises(RuntimeError, match="a bug of the user's") as caught:
        jr.client.forward_backward_custom(
            client, make_data(), jr.losses.CrossEntropy(), regularizers=[dict(name="b", fn=broken, weight=1)]
        )
    assert "term 'b'" in caught.value.__notes__[0]
    assert not client.requests


def test_what_is_no_client_is_refused():
    with pytest.raises(TypeError, match="object has no forward"):
        jr.client.forward_backward_custom(object(), make_data(), sft())
    with pytest.raises(ValueError, match="on_drift"):
        step(Scripted(), on_drift="shout")
    with pytest.raises(TypeError, match="composed already"):
        step(Scripted(), regularizers=[])
