"""The server trains, starts from a saved state, and takes the SDK's own custom losses."""

import numpy as np
import pytest
import torch
from tinker import types

ADAM = types.AdamParams(learning_rate=0.01)


def logprobs_of(client, data):
    """What the model says now, one array a datum."""
    reply = client.forward(data, "cross_entropy").result()
    return [output["logprobs"].to_numpy() for output in reply.loss_fn_outputs]


def largest_gap(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def negative_sum(data, logprobs):
    """The cross-entropy as a custom loss."""
    loss = -sum(
        (torch.as_tensor(d.loss_fn_inputs["weights"].to_numpy()) * x).sum()
        for d, x in zip(data, logprobs, strict=True)
    )
    return loss, {"negative_sum": loss.item()}


def test_a_step_of_plain_sft_raises_the_logprobs(new_training_client, data):
    client = new_training_client()
    before = logprobs_of(client, data)
    reply = client.forward_backward(data, "cross_entropy").result()
    client.optim_step(ADAM).result()
    assert reply.metrics["loss:sum"] == pytest.approx(-sum(x.sum() for x in before), rel=1e-5)
    assert sum(x.sum() for x in logprobs_of(client, data)) > sum(x.sum() for x in before)


def test_clients_with_the_same_state_agree_exactly(new_training_client, start_state, data):
    first, second = (logprobs_of(new_training_client(start_state), data) for _ in range(2))
    assert largest_gap(first, second) == 0
    # The state is not what every new model starts from anyway.
    assert largest_gap(first, logprobs_of(new_training_client(), data)) > 0.1


def test_equal_steps_from_the_same_state_agree_exactly(new_training_client, start_state, data):
    def trained():
        client = new_training_client(start_state)
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(ADAM).result()
        return logprobs_of(client, data)

    first = trained()
    assert largest_gap(first, logprobs_of(new_training_client(start_state), data)) > 0.1
    assert largest_gap(first, trained()) == 0


def test_a_custom_loss_of_the_sdk_trains_like_the_same_loss_on_the_server(
    new_training_client, start_state, data
):
    plain, custom = (new_training_client(start_state) for _ in range(2))
    plain.forward_backward(data, "cross_entropy").result()
    reply = custom.forward_backward_custom(data, negative_sum).result()
    for client in (plain, custom):
        client.optim_step(ADAM).result()
    assert reply.metrics["negative_sum"] == pytest.approx(reply.metrics["loss:sum"], rel=1e-5)
    assert largest_gap(logprobs_of(plain, data), logprobs_of(custom, data)) == 0


def test_data_in_several_requests_is_the_same_step(new_training_client, start_state, data):
    whole, split = new_training_client(start_state), new_training_client(start_state, datums_per_request=1)
    assert [len(list(client._chunked_requests_generator(data))) for client in (whole, split)] == [1, 3]
    for client in (whole, split):
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(ADAM).result()
    assert largest_gap(logprobs_of(whole, data), logprobs_of(split, data)) < 1e-5
