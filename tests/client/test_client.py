"""A step with a remote model: what is sent, what comes back, and that it is the composed gradient."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clients import VOCABULARY, Recorder, Scripted, Slow, make_data, minus_ones, now, reply, sft
from helpers import close

import jaxreg as jr

ADAM = jr.client.AdamParams(learning_rate=1e-2)


def local_logprobs(apply, params, data):
    """[B, T] of the data's targets, padded with zeros; in plain JAX, with nothing of the client's."""
    length = max(len(d.model_input) for d in data)

    def pad(values):
        return np.stack([np.pad(np.asarray(v), (0, length - len(v))) for v in values])

    tokens = pad([d.model_input for d in data])
    targets = pad([d.loss_fn_inputs["target_tokens"] for d in data])
    mask = pad([np.ones(len(d.model_input)) for d in data])
    logits = apply(params, jnp.asarray(tokens, jnp.int32))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], -1)[..., 0]
    return picked * mask


@pytest.mark.filterwarnings("ignore::jaxreg.NormsNotComputedWarning")
def test_steps_are_those_of_the_composed_objective_in_one_process():
    from jaxreg.client.language_model import small_model

    apply, params = small_model(VOCABULARY, 0)
    data, objective = make_data(), sft()
    batch = jr.TokenBatch.pack([d.loss_fn_inputs for d in data], length_buckets=[9], row_buckets=[4])
    # Not Adam: it divides by |g|, and some gradients here are 0 but for rounding (a key's bias).
    tx = optax.sgd(2e-4)
    moments = tx.init(params)
    joint = jax.jit(jax.grad(lambda p: objective(local_logprobs(apply, p, data), batch)[0]))
    with jr.client.EmbeddedTrainingClient(apply, params, optimizer=tx) as client:
        for _ in range(5):
            future = jr.client.forward_backward_custom(client, data, objective)
            client.optim_step()
            loss, _ = objective(local_logprobs(apply, params, data), batch)
            close(future.result().output.loss_total, loss, rtol=1e-5)
            updates, moments = tx.update(joint(params), moments, params)
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(client.params, params, rtol=1e-4, atol=1e-5)


def test_the_result_has_values_norms_and_the_servers_metrics(embedded):
    result = jr.client.forward_backward_custom(embedded, make_data(), sft()).result()
    assert set(result.output.regularizers) == {"kl", "entropy"}
    assert result.metrics["reg/kl/grad_norm"] > 0
    assert "loss:sum" in result.metrics
    assert [len(lp) for lp in result.logprobs] == [5, 9, 3, 7]
    assert len(result.loss_fn_outputs) == 4
    assert result.drift.max < 1e-5


def test_only_what_the_server_reads_is_sent():
    client, data = Recorder(Scripted()), make_data()
    jr.client.forward_backward_custom(client, data, sft()).result()
    assert client.names == ["forward", "forward_backward"]
    for sent in (*client.sent("forward"), *client.sent("forward_backward")):
        for datum, given in zip(sent, data, strict=True):
            assert set(datum.loss_fn_inputs) == {"target_tokens", "weights"}
            assert datum.model_input is given.model_input
            assert datum.loss_fn_inputs["target_tokens"] is given.loss_fn_inputs["target_tokens"]
            assert datum.loss_fn_inputs["weights"].dtype == np.float32
    assert set(data[0].loss_fn_inputs) == {"target_tokens", "weights", "ref_logprobs", "advantage"}


@pytest.mark.filterwarnings("ignore::jaxreg.NormsNotComputedWarning")
def test_the_weights_that_are_sent_are_minus_the_gradient():
    client, data = Recorder(Scripted()), make_data()
    jr.client.forward_backward_custom(client, data, sft()).result()
    batch = jr.TokenBatch.pack([d.loss_fn_inputs for d in data])
    gradient = jax.grad(lambda x: sft()(x, batch)[0])(jnp.where(batch.mask, -1.0, 0.0))
    for sent, expected in zip(client.sent("forward_backward")[0], batch.unpack(gradient), strict=True):
        close(sent.loss_fn_inputs["weights"], -expected, rtol=1e-6)


def test_top_k_targets(embedded):
    data = [
        jr.client.Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != "weights"})
        for d in make_data(k=3)
    ]
    loss = jr.losses.ReverseKLTopK(reference="ref_logprobs")
    result = jr.client.forward_backward_custom(embedded, data, loss).result()
    assert result.logprobs[1].shape == (9, 3)
    embedded.optim_step(ADAM)
    after = jr.client.forward_backward_custom(embedded, data, loss).result()
    assert after.output.loss_total < result.output.loss_total


def test_top_k_targets_one_datum_a_slot_are_the_same_step(embedded):
    data = make_data(k=3)
    loss = jr.losses.KLTopK(reference="ref_logprobs")
    start = embedded.save_state("k").result().path
    weights = []
    for top_k in ("native", "unrolled"):
        embedded.load_state_with_optimizer(start).result()
        client = Recorder(embedded)
        result = jr.client.forward_backward_custom(client, data, loss, top_k=top_k).result()
        assert result.logprobs[1].shape == (9, 3)
        assert len(client.sent("forward_backward")[0]) == (4 if top_k == "native" else 12)
        embedded.optim_step(jr.client.AdamParams(learning_rate=1e-2, eps=1e-3)).result()
        weights.append(embedded.params)
    chex.assert_trees_all_close(*weights, rtol=1e-4, atol=1e-5)  # of steps of 1e-2


def test_a_base_loss_with_regularizers_is_composed_once(embedded):
    from jaxreg.client.ask import as_objective

    def made(weight):
        specs = [dict(name="l1", fn=jr.regularizers.L1(), weight=weight)]
        return as_objective(jr.losses.CrossEntropy(), specs, True)

    assert made(0.1) is made(0.1)
    assert made(0.2).plan is made(0.1).plan
    assert made(jnp.asarray(0.2)).plan is made(0.1).plan


def test_schedules_and_keys_go_along(embedded):
    def noisy(x, batch, *, key):
        return jnp.mean(jax.random.uniform(key, x.shape) * x)

    objective = jr.compose(
        jr.losses.CrossEntropy(),
        [
            dict(name="noisy", fn=noisy, weight=0.1),
            dict(name="l1", fn=jr.regularizers.L1(), weight=optax.linear_schedule(0.0, 1.0, 4)),
        ],
    )
    state = objective.init()
    weights = []
    for i in range(3):
        result = jr.client.forward_backward_custom(
            embedded, make_data(), objective, state=state, key=jax.random.key(i)
        ).result()
        state = result.output.state
        weights.append(float(result.output.regularizers["l1"].weight))
    assert weights == [0.0, 0.25, 0.5]


# The on-policy shortcut.


def test_the_shortcut_makes_one_request_and_the_same_weights(embedded):
    client, data = Recorder(embedded), make_data()
    start = embedded.save_state("start").result().path
    jr.client.forward_backward_custom(client, data, sft()).result()
    client.optim_step(ADAM).result()
    two_requests = embedded.params

    embedded.load_state_with_optimizer(start).result()
    sampled = [
        np.asarray(o["logprobs"]) for o in client.forward(data, "cross_entropy").result().loss_fn_outputs
    ]
    client.requests.clear()
    result = jr.client.forward_backward_custom(client, data, sft(), logprobs=sampled).result()
    assert client.names == ["forward_backward"]
    client.optim_step(ADAM).result()
    chex.assert_trees_all_equal(two_requests, embedded.params)
    assert result.drift.max < 1e-5


def test_stale_logprobs_are_reported(embedded):
    data = make_data()
    stale = [np.full(len(d.model_input), -2.0, np.float32) for d in data]

    def step(**options):
        return jr.client.forward_backward_custom(embedded, data, sft(), logprobs=stale, **options)

    with pytest.warns(UserWarning, match=r"differ by .* nats in the mean .* max_drift is 0.05"):
        result = step().result()
    assert result.drift.mean > 0.05
    with pytest.raises(jr.client.LogprobDrift, match="other weights") as caught:
        step(on_drift="raise").result()
    assert caught.value.gradient_applied == "yes"
    assert step(on_drift="ignore").result().drift.mean == result.drift.mean
    assert step(max_drift=100.0).result().drift.max == result.drift.max


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([[-1.0]] * 3, "3 arrays for 4 datums"),
        ([[-1.0]] * 4, r"datum 0: has shape \(1,\), but 'target_tokens' has \(5,\)"),
        ([np.full(n, v) for n, v in zip((5, 9, 3, 7), (-1, -1, np.nan, -1), strict=True)], "datum 2"),
        ([np.full(n, 0.5) for n in (5, 9, 3, 7)], "datum 0: logprobs are finite and ≤ 0"),
    ],
)
def test_logprobs_that_do_not_fit_send_nothing(logprobs, message):
    client = Scripted()
    with pytest.raises(ValueError, match=message):
        jr.client.forward_backward_custom(client, make_data(), sft(), logprobs=logprobs)
    assert not client.requests


# Data that is wrong sends nothing.


def changed(data, at, **inputs):
    """The data with other inputs in one datum; None takes one away."""
    datum = data[at]
    new = {k: v for k, v in ({**datum.loss_fn_inputs, **inputs}).items() if v is not None}
    return [*data[:at], jr.client.Datum(datum.model_input, new), *data[at + 1 :]]


BAD_DATA = {
    "no data": (lambda d: [], ValueError),
    "sequence of datums": (lambda d: "data", TypeError),
    "datum 0: expected an object with model_input": (lambda d: [{"tokens": 1}], TypeError),
    "datum 1: loss_fn_inputs has no 'target_tokens'": (
        lambda d: changed(d, 1, target_tokens=None),
        ValueError,
    ),
    "datum 2: 'target_tokens' are token ids": (lambda d: changed(d, 2, target_tokens=[0.5] * 3), TypeError),
    "datum 3 has no 'ref_logprobs'": (lambda d: changed(d, 3, ref_logprobs=None), ValueError),
    "the batch has no array 'ref_logprobs'": (lambda d: changed(d[:1], 0, ref_logprobs=None), KeyError),
    "datum 1: its arrays differ in length": (lambda d: changed(d, 1, ref_logprobs=-np.ones(2)), ValueError),
    "datum 0, 'ref_logprobs': NaN": (
        lambda d: changed(d, 0, ref_logprobs=np.full(5, np.nan)),
        ValueError,
    ),
    "datum 1: 'weights' has shape": (lambda d: changed(d, 1, weights=np.ones(4)), ValueError),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_is_named_and_nothing_is_sent(message):
    make, error = BAD_DATA[message]
    client = Scripted()
    with pytest.raises(error, match=message):
        jr.client.forward_backward_custom(client, make(make_data()), sft())
    assert not client.requests


def test_pairs_come_in_twos_and_nothing_else_is_sent():
    client = Scripted()
    with pytest.raises(ValueError, match=r"base loss: DPO takes datums in groups of 2 .* got 3 datums"):
        jr.client.forward_backward_custom(client, make_data()[:3], jr.losses.DPO())
    assert not client.requests


def test_a_term_may_leave_what_it_likes_in_the_padding():
    def root(x, batch):
        return batch.mean(jnp.sqrt(-x))  # at the padding's 0 its slope is infinite, and 0 · ∞ is NaN

    client = Scripted()
    regularizers = [dict(name="root", fn=root, weight=0.1)]
    jr.client.forward_backward_custom(
        client, make_data(), jr.losses.CrossEntropy(), regularizers=regularizers
    )
    for datum in client.requests[-1][1]:
        assert np.isfinite(datum.loss_fn_inputs["weights"]).all()


def test_padding_blames_nobody():
    def root(x, batch):
        return batch.mean(jnp.sqrt(-x))

    def log_of_minus(x, batch):
        return batch.mean(jnp.log(x + 1.0))

    terms = [dict(name="root", fn=root, weight=0.1), dict(name="suspect", fn=log_of_minus, weight=0.1)]
    with pytest.raises(jr.client.NonFiniteGradient, match="it comes from term 'suspect' "):
        jr.client.forward_backward_custom(
            Scripted(), make_data(), jr.losses.CrossEntropy(), regularizers=terms
        )


def test_what_a_term_holds_is_looked_at_before_anything_is_sent():
    def requests_of(reference):
        client = Scripted()
        kl = dict(name="kl", fn=jr.regularizers.KL(reference=reference), weight=0.1)
        try:
            jr.client.forward_backward_custom(
                client, make_data(), jr.losses.CrossEntropy(), regularizers=[kl]
            )
        finally:
            sent.append([name for name, _ in client.requests])

    sent = []
    requests_of(-jnp.ones((4, 128)))
    with pytest.raises(ValueError, match=r"\(4, 64\), but x has \(4, 128\)"):
        requests_of(-jnp.ones((4, 64)))
    assert sent == [["forward", "forward_backward"], []]


def test_coroutine_methods_are_refused():
    class Coroutines(Scripted):
        async def forward(self, data, loss_fn):
            raise AssertionError

    with pytest.raises(TypeError, match="forward is a coroutine function"):
        jr.client.forward_backward_custom(Coroutines(), make_data(), sft())


def test_an_objective_with_a_model_of_its_own_is_refused():
    objective = jr.compose(lambda x, b: x.sum(), forward=lambda p, b: p)
    with pytest.raises(ValueError, match="here the server runs the model"):
        jr.client.forward_backward_custom(Scripted(), make_data(), objective)


def test_the_callers_data_may_change_meanwhile():
    data = make_data()
    client = Slow()
    future = jr.client.forward_backward_custom(client, data, sft())
    sent = client.backward_data
    data.clear()
    client.futures["backward"].set_result(minus_ones(sent))
    assert len(future.result().logprobs) == 4


def test_no_torch_on_the_way_and_no_sdk_needed():
    code = (
        "import sys; sys.modules['tinker'] = None\n"
        "import jaxreg as jr\n"
        "c = jr.client.EmbeddedTrainingClient(vocabulary=8)\n"
        "d = [jr.client.Datum([1, 2], {'target_tokens': [2, 3]})]\n"
        "jr.client.forward_backward_custom(c, d, jr.losses.CrossEntropy()).result(); c.close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_random_lengths_compile_few_programs():
    from jaxreg.core import step

    traces = 0

    def counted(x, batch):
        nonlocal traces
        traces += 1
        return batch.mean(-x)

    rng = np.random.default_rng(0)
    objective = jr.compose(counted)
    client = Scripted()
    at_100 = 0
    for i in range(1000):
        rows, longest = (
            int(np.exp(rng.uniform(np.log(low), np.log(high)))) for low, high in ((1, 65), (64, 1025))
        )
        lengths = [longest, *rng.integers(1, longest + 1, rows - 1)]
        data = [jr.client.Datum([0], {"target_tokens": np.zeros(n, np.int64)}) for n in lengths]
        jr.client.forward_backward_custom(client, data, objective).result()
        at_100 = traces if i == 99 else at_100
    assert traces == at_100
    assert objective.plan.compiled(step.value_and_grad)._cache_size() <= 12


def test_replies_of_other_kinds_are_read():
    class Tensor:  # as an SDK's, without to_numpy
        def __init__(self, values):
            self.data, self.shape = values, [len(values)]

    data = make_data(lengths=(3,))
    answers = [
        reply([[-1.0, -2.0, -3.0]]),
        reply([Tensor([-1.0, -2.0, -3.0])]),
    ]
    answers[1].loss_fn_outputs[0]["logprobs"] = Tensor([-1.0, -2.0, -3.0])
    for answer in answers:
        client = Scripted(forward=answer, backward=answer)
        result = jr.client.forward_backward_custom(client, data, sft()).result()
        close(result.logprobs[0], [-1.0, -2.0, -3.0])
    assert now(1).result() == 1
