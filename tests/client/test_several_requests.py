"""A step in several requests, and several calls before one optimizer step, are the whole batch's step."""

import chex
import jax
import numpy as np
import pytest

import jaxreg as jr

RNG = np.random.default_rng(5)
DATA = [
    jr.client.Datum(
        RNG.integers(0, 16, n).tolist(),
        {
            "target_tokens": RNG.integers(0, 16, n),
            "weights": RNG.choice([0.0, 0.5, 1.0], n),
            "ref_logprobs": -RNG.uniform(0.1, 3, n),
            "unwanted": RNG.integers(0, 2, n).astype(float),
        },
    )
    for n in (3, 9, 1, 5, 2)
]
TERMS = [
    dict(name="kl", fn=jr.regularizers.KL(), weight=0.3),
    dict(name="entropy", fn=jr.regularizers.Entropy(reduction="datum_mean"), weight=0.2),
    dict(name="unlikely", fn=jr.regularizers.Unlikelihood(candidates="unwanted"), weight=0.1),
]


def objective(**more):
    options = {"track_grad_norms": jr.GradNorms(gramian=True, absolutes=True)} | more
    return jr.compose(jr.losses.CrossEntropy(), TERMS, **options)


class Counting(jr.client.EmbeddedTrainingClient):
    """It counts the datums of each request."""

    def __init__(self):
        super().__init__(vocabulary=16)
        self.sent = []

    def forward(self, data, *rest):
        self.sent.append(("forward", len(data)))
        return super().forward(data, *rest)

    def forward_backward(self, data, *rest):
        self.sent.append(("backward", len(data)))
        return super().forward_backward(data, *rest)


def stepped(client):
    client.optim_step(jr.client.AdamParams(learning_rate=0.1)).result()
    return [np.asarray(row) for row in logprobs_of(client)]


def logprobs_of(client):
    reply = client.forward(DATA, "cross_entropy").result()
    return [output["logprobs"] for output in reply.loss_fn_outputs]


@pytest.mark.parametrize("options", [{}, {"aggregator": jr.aggregation.UPGrad()}])
def test_requests_change_nothing_but_how_it_is_sent(options):
    made = objective(**options)
    one, several = Counting(), Counting()
    whole = jr.client.forward_backward_custom(one, DATA, made).result()
    result = jr.client.forward_backward_custom(several, DATA, made, requests=2).result()
    assert several.sent == [("forward", 3), ("forward", 2), ("backward", 3), ("backward", 2)]
    chex.assert_trees_all_close(result.output, whole.output, rtol=1e-5)
    assert result.drift.max < 1e-5
    assert len(result.loss_fn_outputs) == 5
    chex.assert_trees_all_close(stepped(several), stepped(one), rtol=1e-4, atol=1e-5)


def test_more_requests_than_datums_are_one_a_datum():
    client = Counting()
    jr.client.forward_backward_custom(client, DATA, objective(), requests=99).result()
    assert client.sent == [("forward", 1)] * 5 + [("backward", 1)] * 5
    with pytest.raises(ValueError, match="requests is a whole number, at least 1; got 0"):
        jr.client.forward_backward_custom(client, DATA, objective(), requests=0)


def test_calls_that_know_the_whole_add_up():
    made = objective()
    one, several = Counting(), Counting()
    whole = jr.client.forward_backward_custom(one, DATA, made).result().output
    outs = [
        jr.client.forward_backward_custom(several, part, made, totals_of=DATA).result().output
        for part in (DATA[:1], DATA[1:4], DATA[4:])
    ]
    merged = jr.merge_outputs(made, outs)
    for name in ("loss_total", "total_grad_norm", "gramian"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-7)
    for name, term in whole.regularizers.items():
        got = merged.regularizers[name]
        for field in ("value", "grad_norm", "grad_abs_max"):
            np.testing.assert_allclose(getattr(got, field), getattr(term, field), rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_close(got.custom, term.custom, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(stepped(several), stepped(one), rtol=1e-4, atol=1e-5)


def test_a_rule_moves_the_weights_by_the_whole_batch():
    made = objective(weighting=jr.weighting.adaptive_kl("kl", target=0.05))
    state = made.init()
    batch = jr.TokenBatch.pack(DATA)
    x = batch["ref_logprobs"] - 0.5 * batch.mask
    _, want = made.value_and_grad(x, batch, state=state)[0]
    parts = batch.with_arrays(x=x).split(2, reweighted=("unwanted",))
    outs = [made.value_and_grad(part["x"], part, state=state)[0][1] for part in parts]
    chex.assert_trees_all_close(jr.merge_outputs(made, outs, state=state).state, want.state, rtol=1e-5)


def test_what_the_reports_cannot_say_is_refused():
    made = objective()
    with pytest.raises(ValueError, match="one output a part, got none"):
        jr.merge_outputs(made, [])
    _, other = jr.compose(jr.losses.CrossEntropy())(-np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"output 0 is of other terms, \[\]; the objective has \['kl'"):
        jr.merge_outputs(made, [other])
    combined = objective(aggregator=jr.aggregation.UPGrad())
    batch = jr.TokenBatch.pack(DATA[:2])
    out = combined.value_and_grad(batch["ref_logprobs"], batch)[0][1]
    with pytest.raises(ValueError, match="an aggregator needs the gradients of all parts"):
        jr.merge_outputs(combined, [out])
    for options, what in (
        ({"track_grad_norms": jr.GradNorms(every=2)}, r"reports carry old ones, .* leave every= out"),
        ({"weighting": jr.weighting.lr_annealing("kl")}, "the rule .* reads mean magnitudes"),
    ):
        refused = objective(**options)
        out = refused.value_and_grad(batch["ref_logprobs"], batch, state=refused.init())[0][1]
        with pytest.raises(ValueError, match=what):
            jr.merge_outputs(refused, [out])
    judge = jr.host.HostRegularizer("judge", lambda data: 1.0, weight=1.0)
    with judge, pytest.raises(ValueError, match=r"host term 'judge': the data is a part.*additive=True"):
        jr.client.forward_backward_custom(
            Counting(), DATA[:2], jr.compose(jr.losses.CrossEntropy(), [judge]), totals_of=DATA
        )
    with pytest.raises(ValueError, match="totals are of another batch"):
        jr.client.forward_backward_custom(Counting(), DATA, made, totals_of=DATA[:2])


def test_a_request_that_fails_half_way_says_how_much_was_handed_over():
    class Failing(Counting):
        def forward_backward(self, data, *rest):
            if any(kind == "backward" for kind, _ in self.sent):
                raise ConnectionError("gone")
            return super().forward_backward(data, *rest)

    with pytest.raises(jr.client.RequestFailed) as failed:
        jr.client.forward_backward_custom(Failing(), DATA, objective(), requests=2)
    assert failed.value.gradient_applied == "maybe"
    assert "Of 2 requests 1 had been handed over" in failed.value.__notes__[0]


async def both():
    made, client = objective(), Counting()
    future = await jr.client.forward_backward_custom_async(client, DATA, made, requests=3)
    assert len(client.sent) == 6
    return await future


def test_event_loops_wait_for_all_of_them():
    import asyncio

    assert len(asyncio.run(both()).loss_fn_outputs) == 5
    assert jax.tree.leaves(asyncio.run(both()).output)
