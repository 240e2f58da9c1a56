"""The library against implementations that are not ours: PyTorch's, a remote API server's, TRL's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from library_cases import LENGTHS, MASK, data, params
from prepared import CALLS, prepared

import jaxreg as jr

torch = pytest.importorskip("torch")
from torch_cases import PEERS, REAL  # noqa: E402 (it needs torch)


def reduced(values, how, weights):
    """The named reduction of [B], [B, T] or [B, T, K], in PyTorch."""
    if values.ndim == 1:
        real = values[REAL.any(1)]
        return real.sum() if how == "token_sum" else real.mean()
    weights = (weights * REAL).reshape(*REAL.shape, *[1] * (values.ndim - 2)).expand(values.shape)
    values = torch.where(weights != 0, values, 0.0)
    if how == "token_sum":
        return (values * weights).sum()
    if how == "token_mean":
        return (values * weights).sum() / weights.sum()
    rows = [(v * w).sum() / w.sum() for v, w in zip(values, weights, strict=True) if w.sum()]
    return torch.stack(rows).mean()


@pytest.mark.parametrize(("name", "reduction"), CALLS)
def test_value_and_gradient_are_pytorchs(name, reduction, x64):
    case, term, x, batch = prepared(name, reduction)
    (value, _), gradient = jax.value_and_grad(term, has_aux=True)(x, batch)

    d = {k: torch.tensor(v) for k, v in data().items()}
    source = params() if case.x == "params" else data()[case.x]
    theirs = jax.tree.map(lambda a: torch.tensor(a, requires_grad=True), source)
    result = PEERS[name](theirs, d)
    expected = reduced(result, reduction, d["weights"]) if case.reduces else result
    expected.backward()

    close(value, expected.detach().numpy(), rtol=1e-6, atol=1e-12)
    for ours, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(theirs), strict=True):
        slope = 0.0 if leaf.grad is None else leaf.grad.numpy()  # None: a leaf that a filter leaves out
        close(ours, slope, rtol=1e-6, atol=1e-10)


SERVER = {
    "cross_entropy": (lambda: jr.losses.CrossEntropy(reduction="token_sum"), {}),
    "importance_sampling": (lambda: jr.losses.ImportanceSampling(reduction="token_sum"), {}),
    "ppo": (lambda: jr.losses.PPO(low=0.9, high=1.1, reduction="token_sum"), {}),
    "ppo, wider": (
        lambda: jr.losses.PPO(low=0.7, high=1.5, reduction="token_sum"),
        {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5},
    ),
    "cispo": (
        lambda: jr.losses.CISPO(low=0.0, high=4.0, reduction="token_sum"),
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    "dro": (lambda: jr.losses.DRO(beta=0.05, reduction="token_sum"), {"beta": 0.05}),
}


@pytest.mark.parametrize("name", SERVER)
def test_base_losses_are_the_servers_own(name, x64):
    server = pytest.importorskip("tuft.loss_fn", reason="TuFT, a server of the Tinker API")
    make, config = SERVER[name]
    numbers = data()
    lp = torch.tensor(numbers["lp"][MASK], requires_grad=True)  # the server's tokens are packed
    inputs = {"logprobs": "sampler", "advantages": "advantages", "weights": "weights"}
    loss, _ = server.get_loss_fn(name.split(",")[0])(
        {"target_logprobs": lp} | {k: torch.tensor(numbers[v][MASK]) for k, v in inputs.items()}, config
    )
    loss.backward()

    # The server's policy losses know no weights: every token counts alike.
    arrays = {"logprobs": jnp.asarray(numbers["sampler"]), "advantages": jnp.asarray(numbers["advantages"])}
    weights = jnp.asarray(numbers["weights"]) if name == "cross_entropy" else None
    batch = jr.TokenBatch.from_arrays(mask=MASK, weights=weights, **arrays)
    value, gradient = jax.value_and_grad(lambda x: make()(x, batch)[0])(jnp.asarray(numbers["lp"]))
    close(value, loss.item(), rtol=1e-6)
    close(np.asarray(gradient)[MASK], lp.grad.numpy(), rtol=1e-6)


def paired():
    """Two pairs of sampled-token logprobs, their reference's, and the sums a datum."""
    numbers = data()
    lp, ref = (np.where(MASK, numbers[k], 0.0) for k in ("lp", "ref"))
    batch = jr.TokenBatch.from_arrays(mask=MASK, ref_logprobs=jnp.asarray(ref))
    return torch.tensor(lp, requires_grad=True), torch.tensor(ref), jnp.asarray(lp), batch


def test_dpo_is_the_cookbooks(x64):
    cookbook = pytest.importorskip("tinker_cookbook.preference.train_dpo")
    theirs, reference, ours, batch = paired()
    sums, refs = theirs.sum(1), reference.sum(1)
    loss, expected = cookbook.compute_dpo_loss(
        [*sums[0:4:2]], [*sums[1:4:2]], [*refs[0:4:2]], [*refs[1:4:2]], dpo_beta=0.1
    )
    loss.backward()
    (value, metrics), gradient = jax.value_and_grad(jr.losses.DPO(), has_aux=True)(ours, batch)
    close(value, loss.item(), rtol=1e-6)
    close(np.asarray(gradient)[MASK], theirs.grad.numpy()[MASK], rtol=1e-6)
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        close(metrics[name], expected[name], rtol=1e-6)


def test_simpo_is_trls(x64):
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    theirs, _, ours, batch = paired()
    settings = types.SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.5, loss_type="simpo", label_smoothing=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
    )  # fmt: skip
    means = theirs.sum(1)[:4] / torch.tensor(LENGTHS[:4])
    losses, _, _ = trl.CPOTrainer.cpo_loss(settings, means[0::2], means[1::2])
    losses.mean().backward()
    value, gradient = jax.value_and_grad(lambda x: jr.losses.SimPO(beta=2.0, gamma=0.5)(x, batch)[0])(ours)
    close(value, losses.mean().item(), rtol=1e-6)
    close(np.asarray(gradient)[MASK], theirs.grad.numpy()[MASK], rtol=1e-6)


def test_js_and_entropy_are_trls(x64):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    utils = pytest.importorskip("trl.trainer.utils")
    numbers = data()
    z = torch.tensor(numbers["logits"], requires_grad=True)
    labels = torch.where(REAL, 0, -100)
    loss = gkd.GKDTrainer.generalized_jsd_loss(z, torch.tensor(numbers["ref_logits"]), labels=labels)
    loss.backward()
    batch = jr.TokenBatch.from_arrays(mask=MASK, ref_logprobs=jnp.asarray(numbers["ref_logits"]))
    x = jnp.asarray(numbers["logits"])
    value, gradient = jax.value_and_grad(lambda x: jr.regularizers.JS()(x, batch)[0])(x)
    close(value, loss.item(), rtol=1e-6)
    close(gradient, z.grad.numpy(), rtol=1e-6, atol=1e-12)

    entropy = utils.entropy_from_logits(z.detach())[REAL].mean()
    close(jr.regularizers.Entropy()(x, batch)[0], entropy.item(), rtol=1e-6)
