"""Data and clients that the client's tests share."""

import concurrent.futures
import types

import numpy as np

import jaxreg as jr

VOCABULARY = 32


def make_data(seed=0, lengths=(5, 9, 3, 7), k=None):
    """Ragged datums with reference logprobs and advantages; targets [T], or [T, k]."""
    rng = np.random.default_rng(seed)
    data = []
    for n in lengths:
        shape = (n,) if k is None else (n, k)
        inputs = {
            "target_tokens": rng.integers(0, VOCABULARY, shape),
            "weights": (rng.random(n) < 0.8).astype(np.float32),
            "ref_logprobs": -rng.uniform(0.1, 4, shape).astype(np.float32),
            "advantage": np.float32(rng.normal()),
        }
        inputs["weights"][0] = 1.0
        data.append(jr.client.Datum(rng.integers(0, VOCABULARY, n), inputs))
    return data


def sft():
    """A base loss with two regularizers, norms tracked."""
    return jr.compose(
        jr.losses.CrossEntropy(),
        [
            jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(), weight=0.2),
            jr.RegularizerSpec(name="entropy", fn=jr.regularizers.Entropy(mode="maximize"), weight=0.05),
        ],
        track_grad_norms=True,
    )


def reply(logprobs, metrics=None):
    """A server's answer with these logprobs."""
    outputs = [{"logprobs": np.asarray(values)} for values in logprobs]
    return types.SimpleNamespace(loss_fn_outputs=outputs, metrics=metrics or {})


def now(value):
    """A future that is done; an exception is raised when it is asked."""
    future = concurrent.futures.Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class Recorder:
    """Hands everything on to another client, and remembers the requests in their order."""

    def __init__(self, client):
        self._client = client
        self.requests = []

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*args, **kwargs):
            self.requests.append((name, args))
            return method(*args, **kwargs)

        return call

    def sent(self, name):
        """The data of every request of this name."""
        return [args[0] for called, args in self.requests if called == name]

    @property
    def names(self):
        """The requests' names, in order."""
        return [name for name, _ in self.requests]


class Scripted:
    """Answers with what it is told: functions of the data, values, or exceptions."""

    def __init__(self, forward=None, backward=None):
        self._answers = {"forward": forward, "forward_backward": backward}
        self.requests = []

    def forward(self, data, loss_fn):
        return self._answer("forward", data)

    def forward_backward(self, data, loss_fn):
        return self._answer("forward_backward", data)

    def _answer(self, name, data):
        self.requests.append((name, data))
        answer = self._answers[name]
        if answer is None:
            answer = minus_ones
        return now(answer(data) if callable(answer) else answer)


def minus_ones(data):
    """Logprobs of −1 everywhere."""
    return reply([-np.ones(np.shape(d.loss_fn_inputs["target_tokens"]), np.float32) for d in data])


class Slow:
    """A client whose replies arrive when the test lets them, in any order; requests keep theirs."""

    def __init__(self):
        self.order, self.futures = [], {}

    def _request(self, name, value):
        self.order.append(name)
        self.futures[name] = concurrent.futures.Future()
        if value is not None:
            self.futures[name].set_result(value)
        return self.futures[name]

    def forward(self, data, loss_fn):
        return self._request("forward", minus_ones(data))

    def forward_backward(self, data, loss_fn):
        self.backward_data = data
        return self._request("backward", None)

    def optim_step(self, settings):
        return self._request("optim_step", None)
