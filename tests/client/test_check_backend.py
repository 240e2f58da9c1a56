"""check_backend passes on a linear server, and says in words what another one does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.client.types import Datum


class Wrapped:
    """A server that changes the weights of a request before it uses them."""

    def __init__(self, client, change):
        self._client, self._change = client, change

    def __getattr__(self, name):
        return getattr(self._client, name)

    def forward_backward(self, data, loss_fn):
        weights = self._change([np.asarray(d.loss_fn_inputs["weights"], np.float64) for d in data])
        changed = [
            Datum(d.model_input, {**d.loss_fn_inputs, "weights": w.astype(np.float32)})
            for d, w in zip(data, weights, strict=True)
        ]
        return self._client.forward_backward(changed, loss_fn)


def over(total):
    return total if total != 0 else 1e-6


SERVERS = {
    "per sequence, by the sum": (lambda ws: [w / over(w.sum()) for w in ws], "each sequence"),
    "per sequence, by the sum of sizes": (
        lambda ws: [w / over(np.abs(w).sum()) for w in ws],
        "each sequence",
    ),
    "per sequence, by the largest": (lambda ws: [w / over(np.abs(w).max()) for w in ws], "each sequence"),
    "per request, by the sum": (lambda ws: [w / over(sum(v.sum() for v in ws)) for w in ws], "each request"),
    "mean over datums": (lambda ws: [w / len(ws) for w in ws], "averages over the datums"),
    "mean over tokens": (lambda ws: [w / sum(len(v) for v in ws) for w in ws], "averages over the datums"),
    "clamps negative weights": (lambda ws: [np.maximum(w, 0) for w in ws], "loses weights' signs"),
    "takes the size": (lambda ws: [np.abs(w) for w in ws], "loses weights' signs"),
    "a mask": (lambda ws: [(w != 0).astype(float) for w in ws], "a gradient's size is lost"),
    "clips each weight": (lambda ws: [np.clip(w, -1, 1) for w in ws], "clips or saturates"),
    "drops zero sums": (lambda ws: [w * (abs(w.sum()) > 1e-3) for w in ws], "signs or drops"),
    "coarse rounding": (lambda ws: [np.round(w * 4) / 4 for w in ws], ""),
    "upside down": (lambda ws: [-w for w in ws], "climbs where it should descend"),
    "each sequence by its length": (lambda ws: [w / len(w) for w in ws], "does not count tokens alike"),
    "each sequence by its tokens": (
        lambda ws: [w / max(np.count_nonzero(w), 1) for w in ws],
        "does not count tokens alike",
    ),
    "shifted by one": (lambda ws: [np.roll(w, 1) for w in ws], "does not count tokens alike"),
    "without the last": (lambda ws: [np.append(w[:-1], 0.0) for w in ws], "does not count tokens alike"),
    "without the first": (lambda ws: [np.append(0.0, w[1:]) for w in ws], "does not count tokens alike"),
    "only what is positive in all": (
        lambda ws: [w * (sum(v.sum() for v in ws) > 0) for w in ws],
        "requests that sum to nothing",
    ),
    "without small ones": (lambda ws: [w * (np.abs(w) > 1e-3) for w in ws], "drops or rounds small weights"),
    "float16": (lambda ws: [w.astype(np.float16).astype(float) for w in ws], "rounds small weights"),
    "clips large ones": (lambda ws: [np.clip(w, -30, 30) for w in ws], "clips large weights"),
}


@pytest.fixture(scope="module")
def embedded():
    with jr.client.EmbeddedTrainingClient(vocabulary=32) as client:
        yield client


def test_a_linear_server_passes_and_is_left_as_it_was(embedded):
    embedded.optim_step(jr.client.AdamParams(learning_rate=1e-3)).result()
    before = jax.tree.map(np.asarray, embedded.params)
    report = jr.client.check_backend(embedded)
    assert report.ok, str(report)
    assert all(check.error < 1e-3 for check in report.checks.values() if check.name != "evenly")
    assert report.checks["evenly"].error < 0.01  # what curvature is left
    assert 0.01 < report.moved < 0.2
    assert "trains as" not in report.diagnosis
    assert "as they are written" in str(report)
    assert "saved state" in report.not_undone
    chex.assert_trees_all_equal(before, embedded.params)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_not_linear_is_caught_and_named(name, embedded):
    change, words = SERVERS[name]
    report = jr.client.check_backend(Wrapped(embedded, change))
    assert not report.ok, str(report)
    assert words in report.diagnosis, str(report)
    assert "NOT LINEAR" in str(report)


def test_a_gradient_norm_clip_is_caught(embedded):
    class Clipping(Wrapped):
        def optim_step(self, settings):
            return self._client.optim_step(jr.client.AdamParams(**{**vars(settings), "grad_clip_norm": 1.0}))

    report = jr.client.check_backend(Clipping(embedded, lambda ws: ws))
    assert not report.ok
    assert "clips or saturates" in report.diagnosis


def test_rounding_to_bfloat16_is_within_the_tolerance(embedded):
    def rounded(ws):
        return [np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64) for w in ws]

    assert jr.client.check_backend(Wrapped(embedded, rounded)).ok


def test_noise_is_told_from_nonlinearity(embedded):
    rng = np.random.default_rng(0)

    def noisy(size):
        return lambda ws: [w * (1 + size * rng.normal(size=w.shape)) for w in ws]

    slightly = jr.client.check_backend(Wrapped(embedded, noisy(0.01)))
    assert slightly.ok, str(slightly)
    report = jr.client.check_backend(Wrapped(embedded, noisy(1.0)))
    assert not report.ok
    assert "does not repeat itself" in report.diagnosis


def test_a_server_that_does_not_train():
    class Deaf(Wrapped):
        def optim_step(self, settings):
            return self._client.optim_step(jr.client.AdamParams(learning_rate=0.0))

    with (
        jr.client.EmbeddedTrainingClient(vocabulary=32) as client,
        pytest.raises(jr.client.RemoteError, match="does optim_step take effect"),
    ):
        jr.client.check_backend(Deaf(client, lambda ws: ws))


def test_the_state_is_restored_after_a_failure():
    class Failing(Wrapped):
        count = 0

        def forward_backward(self, data, loss_fn):
            self.count += 1
            if self.count == 3:
                raise ConnectionResetError
            return super().forward_backward(data, loss_fn)

    with jr.client.EmbeddedTrainingClient(vocabulary=32) as client:
        before = jax.tree.map(np.asarray, client.params)
        with pytest.raises(jr.client.RequestFailed) as caught:
            jr.client.check_backend(Failing(client, lambda ws: ws))
        assert caught.value.gradient_applied == "maybe"
        chex.assert_trees_all_equal(before, client.params)


def test_what_check_backend_needs():
    with pytest.raises(TypeError, match="has no forward"):
        jr.client.check_backend(object())
    with (
        jr.client.EmbeddedTrainingClient(vocabulary=32) as client,
        pytest.raises(ValueError, match="two datums"),
    ):
        jr.client.check_backend(client, data=[Datum([1], {"target_tokens": [1]})])


def test_a_server_that_goes_away_leaves_word_of_where_the_state_is():
    class Gone(Wrapped):
        gone = False

        def __getattr__(self, name):
            if self.gone:
                return self.fail
            return super().__getattr__(name)

        def fail(self, *_):
            raise ConnectionResetError

        def optim_step(self, settings):
            self.gone = True
            return self._client.optim_step(settings)

    with jr.client.EmbeddedTrainingClient(vocabulary=32) as client:
        with pytest.raises(jr.client.RequestFailed) as caught:
            jr.client.check_backend(Gone(client, lambda ws: ws))
        assert "embedded://jaxreg-check" in caught.value.__notes__[0]
