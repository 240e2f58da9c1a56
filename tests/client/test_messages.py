"""What a remote step says of tokens that are none, and what its futures say of themselves."""

import numpy as np
import pytest

import jaxreg as jr

LOSS = jr.losses.CrossEntropy()


def datum(tokens=(1, 2), **inputs):
    return jr.client.Datum(
        list(tokens) if isinstance(tokens, tuple) else tokens, {"target_tokens": [2, 3]} | inputs
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [1.0, 2.0],
            r"datum 1: model_input is a list of token ids, whole numbers.*float64: say .astype\(int\)",
        ),
        (np.array([1.5, 2.5], np.float32), "whole numbers.*got float32"),
        ([[1, 2]], r"datum 1: model_input .* got shape \(1, 2\)"),
        ("ab", "got str"),
        (None, "got NoneType"),
        (
            [1, 2, 3],
            r"datum 1: model_input has shape \(3,\), and 'target_tokens' \(2,\): one token in for every",
        ),
    ],
)
def test_tokens_that_are_none(embedded, tokens, message):
    with pytest.raises(jr.client.RequestFailed, match=message):
        jr.client.forward_backward_custom(embedded, [datum(), datum(tokens)], LOSS)
    if "one token in" not in message:  # the server's own rule
        with pytest.raises((TypeError, ValueError), match=message):
            jr.client.payload.request([datum(), datum(tokens)], [np.zeros(2), np.zeros(2)], model_id="m")


def test_one_datum_without_a_list(embedded):
    with pytest.raises(TypeError, match="got Datum; put this one into a list"):
        jr.client.forward_backward_custom(embedded, datum(), LOSS)


def test_an_iterator_of_regularizers_would_be_empty_at_the_second_step(embedded):
    term = dict(name="e", fn=jr.regularizers.Entropy(), weight=0.1)
    with pytest.raises(TypeError, match=r"gives its terms once.*list"):
        jr.client.forward_backward_custom(embedded, [datum()], LOSS, regularizers=iter([term]))


def test_futures_and_results_say_what_they_are(embedded):
    future = jr.client.forward_backward_custom(embedded, [datum()], LOSS, step=41)
    assert repr(future).startswith("<CustomFuture of step 41: ")
    assert "<table" in future._repr_html_()
    result = future.result()
    assert repr(future) == "<CustomFuture of step 41: done>"
    assert repr(result).startswith("CustomResult of 1 datum, 2 logprobs, drift 0 nats")
    assert "base loss" in repr(result)
    assert "<table" in result._repr_html_()


def test_a_future_that_failed_or_cannot_tell(embedded):
    class Silent:
        """A client's future that breaks when it is asked."""

        def __init__(self, future):
            self.result = future.result

        def done(self):
            raise RuntimeError("no answer")

    class Client:
        forward = embedded.forward

        def forward_backward(self, data, loss_fn):
            return Silent(embedded.forward_backward(data[:0] or data, loss_fn))

    future = jr.client.forward_backward_custom(Client(), [datum()], LOSS, step=1)
    assert (
        repr(future)
        == "<CustomFuture of step 1: its loss is known (output), and the server's answer on its way>"
    )

    bad = embedded.forward([datum([1.0, 2.0])], "cross_entropy")
    with pytest.raises(TypeError):
        bad.result()
    assert repr(bad) == "<ClientFuture: failed, TypeError>"
