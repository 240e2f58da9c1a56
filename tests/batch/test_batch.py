"""Packing: nothing is lost, padding changes nothing, and few shapes are compiled."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TERMS, close, logprobs, nll, specs, token_batch
from hypothesis import given

import jaxreg as jr
from jaxreg.batch.buckets import coarse_length, coarse_rows


@st.composite
def ragged(draw, max_rows=9, max_length=300):
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k = draw(st.integers(1, 4))
    return [
        {
            "logprobs": -np.abs(rng.normal(size=n)).astype(np.float32),
            "top": rng.normal(size=(n, k)).astype(np.float32),
            "target_tokens": rng.integers(0, 100, n),
            "weights": rng.integers(0, 2, n).astype(np.float32),
            "reward": np.float32(rng.normal()),
        }
        for n in lengths
    ]


@given(ragged())
def test_unpack_is_the_inverse_of_pack(data):
    batch = jr.TokenBatch.pack(data)
    for name in ("logprobs", "top", "target_tokens", "reward"):
        for got, datum in zip(batch.unpack(batch[name]), data, strict=True):
            np.testing.assert_array_equal(got, datum[name])
    for got, datum in zip(batch.unpack(batch.weights), data, strict=True):
        np.testing.assert_array_equal(got, datum["weights"])
    rows, length = batch.shape
    assert rows % 2 == 0
    assert batch.mask.sum() == sum(len(d["logprobs"]) for d in data)
    chex.assert_shape(batch["top"], (rows, length, data[0]["top"].shape[1]))
    assert not batch.mask[len(data) :].any()
    chex.assert_shape(batch["reward"], (rows,))


@given(ragged())
def test_reductions_agree_with_numpy(data):
    batch = jr.TokenBatch.pack(data)
    v, w = ([np.asarray(d[k], np.float64) for d in data] for k in ("logprobs", "weights"))
    total, weight = sum((a * b).sum() for a, b in zip(v, w, strict=True)), sum(b.sum() for b in w)
    close(batch.sum(batch["logprobs"]), total, atol=1e-5)
    close(batch.mean(batch["logprobs"]), total / weight if weight else 0)
    means = [(a * b).sum() / b.sum() for a, b in zip(v, w, strict=True) if b.sum()]
    close(batch.datum_mean(batch["logprobs"]), np.mean(means) if means else 0)
    close(batch.mean(batch["logprobs"], weights=batch.mask), np.concatenate(v).mean())
    rewards = [d["reward"] for d in data if d["weights"].any()]  # a datum of weight 0 is not there
    close(batch.mean(batch["reward"]), np.mean(rewards) if rewards else 0)
    top = [np.asarray(d["top"], np.float64) for d in data]
    numerator = sum((a * b[:, None]).sum() for a, b in zip(top, w, strict=True))
    close(batch.mean(batch["top"]), numerator / (weight * top[0].shape[1]) if weight else 0)


OBJECTIVE = jr.compose(nll, specs(l1=0.5, l2=0.1, drift=0.2), track_grad_norms=True)


@given(st.integers(0, 1000), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_what_stands_in_the_padding_changes_not_one_bit(seed, garbage):
    rng = np.random.default_rng(seed)
    batch = token_batch(rng)
    x = logprobs(rng, batch)
    real = np.asarray(batch.mask)
    dirty = batch.replace(arrays={k: np.where(real, v, garbage) for k, v in batch.arrays.items()})

    terms = {
        "l1": jr.regularizers.L1(),
        "l2": jr.regularizers.L2(center="mean", reduction="datum_mean"),
        "kl": jr.regularizers.KL(reference="ref"),
        "entropy": jr.regularizers.Entropy(),
    }
    objective = jr.compose(
        jr.losses.CrossEntropy(),
        [jr.RegularizerSpec(name=name, fn=fn, weight=0.3) for name, fn in terms.items()],
        track_grad_norms=True,
    )
    want = objective.value_and_grad(x, batch)
    got = objective.value_and_grad(jnp.where(real, x, garbage), dirty)
    chex.assert_tree_all_finite(want)  # a NaN equals a NaN below
    chex.assert_trees_all_equal(want[0], got[0])
    assert np.array_equal(np.where(real, want[1], 0), np.where(real, got[1], 0))
    assert np.array_equal(want[1][~real], np.zeros((~real).sum()))


@given(st.integers(0, 1000))
def test_more_padding_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    data = [{"ref": -rng.uniform(0.1, 3, n), "lp": -rng.uniform(0.1, 3, n)} for n in (5, 3, 7)]
    small = jr.TokenBatch.pack(data, length_buckets=[8], row_buckets=[4])
    large = jr.TokenBatch.pack(data, length_buckets=[64], row_buckets=[16])
    (a, out_a), grad_a = OBJECTIVE.value_and_grad(small["lp"], small)
    (b, out_b), grad_b = OBJECTIVE.value_and_grad(large["lp"], large)
    close(a, b, rtol=1e-6)
    for name in TERMS:
        close(out_a.regularizers[name].value, out_b.regularizers[name].value, rtol=1e-6)
        close(out_a.regularizers[name].grad_norm, out_b.regularizers[name].grad_norm, rtol=1e-6)
    for one, other in zip(small.unpack(grad_a), large.unpack(grad_b), strict=True):
        close(one, other, rtol=1e-6)


def test_a_thousand_ragged_batches_for_a_server_compile_at_most_twelve_programs(rng):
    traces = []

    def loss(x, batch):
        traces.append(batch.shape)
        return -batch.mean(x)

    objective = jr.compose(loss, [dict(name="l2", fn=jr.regularizers.L2(reduction="token_sum"), weight=0.1)])
    for i in range(1000):
        rows = int(rng.integers(1, 65))
        longest = int(rng.integers(1, 1025))  # so that short batches come, too
        data = [{"logprobs": np.full(n, -1.0, np.float32)} for n in rng.integers(1, longest + 1, rows)]
        batch = jr.TokenBatch.pack(data, length_buckets=coarse_length, row_buckets=coarse_rows)
        (loss_value, _), _ = objective.value_and_grad(batch["logprobs"], batch)
        if i % 100 == 0:
            close(loss_value, 1 + 0.1 * batch.mask.sum(), rtol=1e-5)
    assert len(traces) == len(set(traces)) <= 12


class Tensor:
    """Like the API's TensorData."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def to_numpy(self):
        return self.array


class Datum:
    def __init__(self, **inputs):
        self.loss_fn_inputs = {k: Tensor(v) for k, v in inputs.items()}


def test_the_apis_datums_and_masks():
    data = [Datum(logprobs=[-1.0, -2.0, -3.0], mask=[0.0, 1.0, 1.0], advantages=[1.0, 2.0, 3.0])]
    batch = jr.TokenBatch.pack(data)
    assert batch.mask[0, :4].tolist() == [False, True, True, False]
    assert float(batch.mean(batch["logprobs"])) == -2.5
    assert len(batch.unpack(batch["advantages"])[0]) == 3  # masked tokens are still the datum's


def test_weights_a_token_and_target():
    data = [{"top": np.ones((2, 3)), "weights": np.full((2, 3), 0.5)}]
    batch = jr.TokenBatch.pack(data)
    chex.assert_shape(batch.weights, (2, 8, 3))
    assert float(batch.sum(batch["top"])) == 3
    with pytest.raises(ValueError, match="weights that fit"):
        batch.mean(batch.mask.astype(np.float32))


def test_an_empty_mask_gives_zero_and_no_gradient(rng):
    batch = token_batch(rng)
    batch = batch.replace(weights=np.zeros_like(batch.weights))
    x = logprobs(rng, batch)
    for reduce in ("sum", "mean", "datum_mean"):
        value, grad = jax.value_and_grad(getattr(batch, reduce))(x)
        assert float(value) == 0
        assert not np.asarray(grad).any()


def test_it_is_a_pytree_and_a_mapping(rng):
    batch = token_batch(rng, advantages=lambda n: rng.normal(size=n))
    assert sorted(batch) == ["advantages", "mask", "ref", "weights"]
    assert len(batch) == 4
    assert "ref" in batch
    doubled = jax.tree.map(lambda a: a, batch)
    assert np.array_equal(doubled["ref"], batch["ref"])
    assert jax.jit(lambda b: b.mean(b["ref"]))(batch) == pytest.approx(float(batch.mean(batch["ref"])))
