"""Twenty remote steps with UPGrad: the same as written by hand in PyTorch, with TorchJD's coefficients."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

torch = pytest.importorskip("torch")
peer = pytest.importorskip("torchjd.aggregation")
VOCABULARY, EPS = 12, 1e-4


def datums(rng):
    return [
        jr.client.Datum(
            rng.integers(0, VOCABULARY, n).tolist(),
            {
                "target_tokens": rng.integers(0, VOCABULARY, n),
                "weights": rng.uniform(0.5, 1, n).astype(np.float32),
                "ref": -rng.uniform(0.1, 3, n).astype(np.float32),
            },
        )
        for n in (5, 3, 7)
    ]


def by_hand(table, optimizer, data, seen):
    """One step: the terms' gradients at the logprobs, combined, and pulled back through the model once."""
    rows = [torch.tensor(d.loss_fn_inputs["target_tokens"].tolist()) for d in data]
    tokens = [torch.tensor(d.model_input) for d in data]
    logprobs = torch.cat(
        [
            torch.log_softmax(table[t], -1).gather(1, y[:, None])[:, 0]
            for t, y in zip(tokens, rows, strict=True)
        ]
    )
    weights, ref = (
        torch.cat([torch.tensor(np.asarray(d.loss_fn_inputs[name].tolist())) for d in data])
        for name in ("weights", "ref")
    )
    whole = weights.sum()
    log_ratio = ref - logprobs
    terms = (
        -(weights * logprobs).sum() / whole,
        0.5 * (weights * (torch.expm1(log_ratio) - log_ratio)).sum() / whole,
        0.3 * (weights * logprobs.exp()).sum() / whole,
    )
    gradients = torch.stack([torch.autograd.grad(term, logprobs, retain_graph=True)[0] for term in terms])
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=EPS)
    weighting = peer.UPGradWeighting(torch.ones(3, dtype=torch.float64), projector)
    coefficients = weighting(gradients @ gradients.T)
    seen.append(coefficients.tolist())
    optimizer.zero_grad()
    logprobs.backward(coefficients @ gradients)
    optimizer.step()


def test_twenty_steps():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    client = jr.client.EmbeddedTrainingClient(lambda params, tokens: params[tokens], start)
    objective = jr.compose(
        lambda x, batch: -batch.mean(x),
        [
            dict(name="kl", fn=jr.regularizers.KL(reference="ref", max_log_ratio=None), weight=0.5),
            dict(name="sure", fn=lambda x, batch: batch.mean(jnp.exp(x)), weight=0.3),
        ],
        aggregator=jr.aggregation.UPGrad(reg_eps=EPS, relative_to="trace"),
    )
    table = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([table], lr=0.05, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    seen = []
    for _ in range(20):
        data = datums(rng)
        result = jr.client.forward_backward_custom(client, data, objective).result()
        client.optim_step(jr.client.AdamParams(learning_rate=0.05)).result()
        by_hand(table, optimizer, data, seen)
        np.testing.assert_allclose(list(result.output.aggregation.coefficients.values()), seen[-1], rtol=2e-4)
    assert np.ptp(seen) > 0.5  # they do conflict
    np.testing.assert_allclose(client.params, table.detach().numpy(), atol=1e-5 * np.abs(start).max())
