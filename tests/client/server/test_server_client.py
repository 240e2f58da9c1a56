"""Composed objectives on the real server: the same twenty steps, taken along three ways."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from places import EXAMPLES
from serve import KEY, MODEL, VOCABULARY
from tinker import types

import jaxreg as jr

F = torch.nn.functional
ADAM = types.AdamParams(learning_rate=3e-3, eps=1e-4)  # far above rounding: Adam divides by |gradient|
STEPS = 20
EPS = 1e-4  # of UPGrad


def chosen_nll(lp, batch):
    import jax.numpy as jnp

    chosen = (jnp.arange(lp.shape[0]) % 2 == 0)[:, None]
    return batch.mean(-lp, weights=batch.weights * chosen)


def probability(lp, batch):
    import jax.numpy as jnp

    return batch.mean(jnp.exp(lp))


OBJECTIVES = {
    "sft": jr.compose(
        jr.losses.CrossEntropy(reduction="token_mean"),
        [
            jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(), weight=0.1),
            jr.RegularizerSpec(name="l2", fn=jr.regularizers.L2(reduction="token_mean"), weight=0.02),
        ],
        track_grad_norms=True,
    ),
    "pairs": jr.compose(
        jr.losses.DPO(beta=0.1),
        [
            jr.RegularizerSpec(name="chosen_nll", fn=chosen_nll, weight=0.1),
            jr.RegularizerSpec(name="log_ratio", fn=jr.regularizers.LogRatioL2(), weight=0.001),
        ],
        track_grad_norms=True,
    ),
    "upgrad": jr.compose(
        jr.losses.CrossEntropy(reduction="token_mean"),
        [
            jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(max_log_ratio=None), weight=0.5),
            jr.RegularizerSpec(name="sure", fn=probability, weight=2.0),
        ],
        aggregator=jr.aggregation.UPGrad(reg_eps=EPS, relative_to="trace"),
    ),
}


def drawn(seed=1, lengths=(9, 5, 7, 6)):
    """Ragged arrays a datum: tokens, targets, weights, and a reference's logprobs."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        weights = (rng.random(n) < 0.7).astype(np.float32)
        weights[-1] = 1.0
        rows.append(
            {
                "tokens": rng.integers(0, VOCABULARY, n).tolist(),
                "target_tokens": rng.integers(0, VOCABULARY, n),
                "weights": weights,
                "ref_logprobs": -rng.uniform(3, 8, n).astype(np.float32),
            }
        )
    return rows


ROWS = drawn()
SEEN = []  # UPGrad's coefficients, as TorchJD has them


def datums(*keys):
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row["tokens"]),
            loss_fn_inputs={key: row[key] for key in keys},
        )
        for row in ROWS
    ]


def by_hand(name):
    """The composite as the SDK's users write it."""

    def sft(data, logprobs):
        total = sums = 0.0
        for row, lp in zip(ROWS, logprobs, strict=True):
            weights, ref = torch.tensor(row["weights"]), torch.tensor(row["ref_logprobs"])
            gap = ref - lp
            each = -lp + 0.1 * (torch.exp(gap) - gap - 1) + 0.02 * lp**2
            total, sums = total + (weights * each).sum(), sums + weights.sum()
        return total / sums, {}

    def pairs(data, logprobs):
        scores, squares, nll = [], 0.0, 0.0
        weights = [torch.tensor(row["weights"]) for row in ROWS]
        for row, w, lp in zip(ROWS, weights, logprobs, strict=True):
            gap = lp - torch.tensor(row["ref_logprobs"])
            scores.append((w * gap).sum())
            squares = squares + (w * gap**2).sum()
        dpo = torch.stack([-F.logsigmoid(0.1 * (scores[i] - scores[i + 1])) for i in (0, 2)]).mean()
        for w, lp in zip(weights[::2], logprobs[::2], strict=True):
            nll = nll - (w * lp).sum()
        nll = nll / sum(w.sum() for w in weights[::2])
        return dpo + 0.1 * nll + 0.001 * squares / sum(w.sum() for w in weights), {}

    def upgrad(data, logprobs):
        """The terms' gradients at the logprobs, and a loss whose gradient is what TorchJD makes of them."""
        from torchjd.aggregation import UPGradWeighting
        from torchjd.linalg import QuadprogProjector

        lp = torch.cat(list(logprobs))
        weights, ref = (
            torch.cat([torch.tensor(row[k]) for row in ROWS]) for k in ("weights", "ref_logprobs")
        )
        gap = ref - lp
        each = (-lp, 0.5 * (torch.exp(gap) - gap - 1), 2.0 * torch.exp(lp))
        terms = [(weights * values).sum() / weights.sum() for values in each]
        rows = torch.stack([torch.autograd.grad(term, lp, retain_graph=True)[0] for term in terms]).double()
        projector = QuadprogProjector(norm_eps=0.0, reg_eps=EPS)
        coefficients = UPGradWeighting(torch.ones(3, dtype=torch.float64), projector)(rows @ rows.T)
        SEEN.append(coefficients.tolist())
        return (lp * (coefficients @ rows).float()).sum(), {}

    return {"sft": sft, "pairs": pairs, "upgrad": upgrad}[name]


def ours(client, name):
    data = datums("target_tokens", "weights", "ref_logprobs")
    return jr.client.forward_backward_custom(client, data, OBJECTIVES[name])


def through_the_hook(client, name):
    side = [{"ref_logprobs": row["ref_logprobs"]} for row in ROWS]
    callback = jr.client.as_custom_loss(OBJECTIVES[name], side_data=side)
    return client.forward_backward_custom(datums("target_tokens", "weights"), callback)


def in_pytorch(client, name):
    return client.forward_backward_custom(datums("target_tokens", "weights"), by_hand(name))


def logprobs_of(client):
    reply = client.forward(datums("target_tokens", "weights"), "cross_entropy").result()
    return [output["logprobs"].to_numpy() for output in reply.loss_fn_outputs]


def trained(client, step, name):
    for _ in range(STEPS):
        future = step(client, name)
        client.optim_step(ADAM).result()
        future.result()
    return logprobs_of(client)


def gap(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_twenty_steps_end_in_the_same_logprobs(name, new_training_client, start_state):
    start = logprobs_of(new_training_client(start_state))
    expected = trained(new_training_client(start_state), in_pytorch, name)
    gaps = {}
    for step, per_request in itertools.product((ours, through_the_hook, in_pytorch), (None, 1)):
        client = new_training_client(start_state, datums_per_request=per_request)
        gaps[step.__name__, per_request] = gap(trained(client, step, name), expected)
    print(name, "moved by", gap(start, expected), "apart by", gaps)
    assert gap(start, expected) > 0.5
    assert max(gaps.values()) < 1e-5
    if name == "upgrad":
        assert np.max(SEEN) > 1.05  # they do conflict


def in_three_requests(client, name):
    data = datums("target_tokens", "weights", "ref_logprobs")
    return jr.client.forward_backward_custom(client, data, OBJECTIVES[name], requests=3)


class Calls:
    """Three calls that each have a part of the batch."""

    def __init__(self, client, name):
        data = datums("target_tokens", "weights", "ref_logprobs")
        self.objective = OBJECTIVES[name]
        self.futures = [
            jr.client.forward_backward_custom(client, part, self.objective, totals_of=data)
            for part in (data[:1], data[1:3], data[3:])
        ]

    def result(self):
        return jr.merge_outputs(self.objective, [future.result().output for future in self.futures])


def test_a_batch_in_parts_trains_like_the_whole(new_training_client, start_state):
    expected = trained(new_training_client(start_state), ours, "sft")
    for step in (in_three_requests, Calls):
        assert gap(trained(new_training_client(start_state), step, "sft"), expected) < 1e-5
    whole = ours(new_training_client(start_state), "sft").result().output
    parts = Calls(new_training_client(start_state), "sft").result()
    for name in ("loss_total", "total_grad_norm"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5)
    combined = trained(new_training_client(start_state), ours, "upgrad")
    assert gap(trained(new_training_client(start_state), in_three_requests, "upgrad"), combined) < 1e-5


def test_the_shortcut_is_one_request_and_the_same_weights(new_training_client, start_state):
    def run(shortcut):
        client = new_training_client(start_state)
        given = logprobs_of(client) if shortcut else None
        calls = []
        original = client.forward
        client.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
        data = datums("target_tokens", "weights", "ref_logprobs")
        result = jr.client.forward_backward_custom(client, data, OBJECTIVES["sft"], logprobs=given).result()
        client.optim_step(ADAM).result()
        client.forward = original
        return logprobs_of(client), len(calls), result.drift.max

    two, one = run(False), run(True)
    assert (two[1], one[1]) == (1, 0)
    assert gap(two[0], one[0]) == 0
    assert one[2] < 1e-5


def test_the_server_is_linear_and_left_as_it_was(new_training_client, start_state):
    client = new_training_client(start_state)
    before = logprobs_of(client)
    report = jr.client.check_backend(client)
    print(report)
    assert report.ok, str(report)
    assert gap(before, logprobs_of(client)) == 0


def test_metrics_of_the_hook_carry_the_flat_names(new_training_client, start_state):
    side = [{"ref_logprobs": row["ref_logprobs"]} for row in ROWS]
    callback = jr.client.as_custom_loss(OBJECTIVES["sft"], side_data=side, reduction="mean")
    client = new_training_client(start_state)
    metrics = client.forward_backward_custom(datums("target_tokens", "weights"), callback).result().metrics
    assert metrics["reg/kl/value:mean"] == float(callback.output.regularizers["kl"].value)
    assert "loss:sum" in metrics


def test_what_the_server_refuses_is_a_typed_error(new_training_client):
    client = new_training_client()
    row = ROWS[0]
    bad = types.Datum(
        model_input=types.ModelInput.from_ints(row["tokens"]),
        loss_fn_inputs={
            "target_tokens": row["target_tokens"] + VOCABULARY,
            "ref_logprobs": row["ref_logprobs"],
        },
    )
    with pytest.raises(jr.client.RequestFailed) as caught:
        jr.client.forward_backward_custom(client, [bad], OBJECTIVES["sft"])
    assert (caught.value.step, caught.value.gradient_applied) == ("forward", "no")
    # and the client is as good as before
    assert (
        jr.client.forward_backward_custom(
            client, datums("target_tokens", "weights", "ref_logprobs"), OBJECTIVES["sft"]
        )
        .result()
        .drift.max
        < 1e-5
    )


RECIPES = {
    "finetune": [],
    "open_character": [],
    "preferences": [],
    "distillation": ["--unroll-top-k"],
    "answers": ["--unroll-top-k"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, server_url, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    recipe = importlib.import_module(f"remote_{name}")
    server = ["--base-url", server_url, "--model", MODEL, "--tokenizer", "bytes"]
    results = recipe.main([*server, "--steps", "4", *RECIPES[name]])
    losses = [float(result.output.loss_total) for result in results[:4]]  # of the first stage
    assert losses[-1] < losses[0]
