"""Micro-batches give what the whole batch gives: value, gradient, norms, Gramian, metrics, state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxreg as jr

B, T, V, D = 8, 5, 7, 4
RNG = np.random.default_rng(0)


def forward(params, batch):
    return jnp.tanh(batch["inputs"] @ params["body"]) @ params["head"]


def params(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {
        "body": jnp.asarray(rng.normal(size=(D, D)), dtype),
        "head": jnp.asarray(rng.normal(size=(D, V)), dtype),
    }


def batch_of(seed=0, rows=B, dtype=np.float32, pairs=False):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, T)) < 0.7
    weights = rng.choice([0.0, -0.5, 0.3, 1.0, 2.0], (rows, T))
    mask[-1] = False
    return jr.TokenBatch.from_arrays(
        mask=jnp.asarray(mask),
        weights=jnp.asarray(weights, dtype),
        inputs=jnp.asarray(rng.normal(size=(rows, T, D)), dtype),
        target_tokens=jnp.asarray(rng.integers(0, V, (rows, T))),
        ref_logprobs=jnp.asarray(-rng.uniform(0.1, 3, (rows, T)), dtype),
        unwanted=jnp.asarray(rng.integers(0, 2, (rows, T)), dtype),
    )


def terms():
    R = jr.regularizers
    return [
        dict(name="kl", fn=R.KL(inputs="logits"), weight=0.3),
        dict(name="entropy", fn=R.Entropy(inputs="logits", reduction="datum_mean"), weight=0.2),
        dict(name="unlikely", fn=R.Unlikelihood(candidates="unwanted", inputs="logits"), weight=0.1),
        dict(name="z", fn=R.ZLoss(reduction="token_sum"), weight=1e-3),
        dict(name="decay", fn=R.WeightL2(), weight=0.05),
    ]


def objective_of(**more):
    with pytest.warns(jr.MixedReductionsWarning):
        return jr.compose(jr.losses.CrossEntropy(inputs="logits"), terms(), forward=forward, **more)


G, AGG = jr.GradNorms, jr.aggregation
ASKED = {
    "no norms": {},
    "outputs": dict(track_grad_norms=G(wrt="outputs", gramian=True, absolutes=True)),
    "a datum": dict(track_grad_norms=G(wrt="outputs", per_datum=True)),
    "params": dict(track_grad_norms=G(gramian=True, absolutes=True)),
    "a filter": dict(track_grad_norms=G(params="head", gramian=True)),
    "chunks": dict(track_grad_norms=G(chunk_size=2)),
    "outputs combined": dict(aggregator=AGG.UPGrad()),
    "outputs combined, params measured": dict(aggregator=AGG.UPGrad(), track_grad_norms=True),
    "params combined": dict(aggregator=AGG.UPGrad(wrt="params"), track_grad_norms=G(gramian=True)),
}


def known(out):
    """An output without what differs on purpose: metrics of a kind that is not known."""
    return out.replace(state={}, aux=None, approximate=())


def agree(got, want, rtol=1e-5, atol=1e-6):
    (loss, out), grads = got
    (whole, wanted), slopes = want
    chex.assert_trees_all_close(
        (loss, known(out), grads), (whole, known(wanted), slopes), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("steps", [3])
def test_accumulated_is_whole(asked, steps):
    objective = objective_of(**ASKED[asked])
    x, batch = params(), batch_of()
    want = objective.value_and_grad(x, batch)
    agree(jr.accumulate(objective, x, batch, steps=steps), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("asked", ["outputs", "a filter", "params combined"])
def test_a_python_loop_gives_the_same(asked):
    objective = objective_of(**ASKED[asked])
    x, batch = params(), batch_of(rows=9)
    sums = None
    for part in batch.split(3, reweighted=("unwanted",)):
        sums = jr.add_part(objective, sums, x, part)
    agree(jr.finish_parts(objective, sums, x), objective.value_and_grad(x, batch), rtol=2e-5, atol=2e-6)


def test_in_float64_they_agree_to_ten_digits():
    with jax.enable_x64(True):
        objective = objective_of(track_grad_norms=G(gramian=True))
        x, batch = params(np.float64), batch_of(3, rows=7, dtype=np.float64)
        want = objective.value_and_grad(x, batch)
        agree(jr.accumulate(objective, x, batch, steps=4), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("asked", ["no norms", "outputs", "params", "params combined"])
def test_over_eight_devices_it_is_the_whole_batchs(asked, check_vma):
    objective = objective_of(**ASKED[asked])
    x, batch = params(), batch_of(rows=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def own(x, batch):
        return jr.accumulate(objective, x, batch, steps=2, axis_name="data")

    sharded = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    want = objective.value_and_grad(x, batch)
    agree(jax.jit(sharded)(x, batch), want, rtol=2e-5, atol=2e-6)
