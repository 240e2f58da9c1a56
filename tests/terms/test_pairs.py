"""Losses on pairs: their formulas, which pairs count, and rows that are no pairs."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clients import Recorder, Scripted, make_data
from helpers import close, graded

import jaxreg as jr

DPO, SimPO = jr.losses.DPO, jr.losses.SimPO


def numbers(pairs=3, length=5, seed=0):
    rng = np.random.default_rng(seed)
    lp, ref = (-rng.uniform(0.1, 3, (2 * pairs, length)) for _ in range(2))
    return lp, ref, rng.uniform(0.2, 2, (2 * pairs, length))


def log_sigmoid(z):
    return -np.logaddexp(0, -z)


def oracle(lp, ref, w, *, beta=0.1, loss_type="sigmoid", label_smoothing=0.0, average_tokens=False):
    delta = (w * (lp - ref)).sum(1)
    if average_tokens:
        delta = delta / w.sum(1)
    h = delta[0::2] - delta[1::2]
    if loss_type == "ipo":
        return np.mean((h - 1 / (2 * beta)) ** 2)
    smooth = label_smoothing
    return np.mean(-(1 - smooth) * log_sigmoid(beta * h) - smooth * log_sigmoid(-beta * h))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.5, "beta": 2.0},
        {"loss_type": "ipo"},
        {"loss_type": "ipo", "average_tokens": True, "beta": 0.3},
        {"average_tokens": True, "label_smoothing": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("reference", ["ref", None])
def test_dpo_value_and_gradient(options, reference, x64):
    lp, ref, w = numbers()
    if reference is None:
        ref = np.zeros_like(ref)
    batch = jr.TokenBatch.from_arrays(weights=jnp.asarray(w), ref=jnp.asarray(ref))
    term = DPO(reference=reference, **options)
    (value, metrics), slope = graded(term, jnp.asarray(lp), batch)
    slope = np.asarray(slope)
    close(value, oracle(lp, ref, w, **options), rtol=1e-12)
    for index in np.ndindex(lp.shape):
        step = np.zeros_like(lp)
        step[index] = 1e-5
        numerical = (oracle(lp + step, ref, w, **options) - oracle(lp - step, ref, w, **options)) / 2e-5
        close(slope[index], numerical, rtol=1e-6, atol=1e-8)
    delta = (w * (lp - ref)).sum(1) / (w.sum(1) if options.get("average_tokens") else 1)
    close(metrics["margin"], options.get("beta", 0.1) * (delta[0::2] - delta[1::2]).mean())
    close(metrics["accuracy"], (delta[0::2] > delta[1::2]).mean())


def test_label_smoothing_stays_finite_far_out():
    x = jnp.array([[-1e4], [-1.0]])
    term = DPO(beta=1.0, reference=None, label_smoothing=0.1)
    value, slope = jax.value_and_grad(lambda x: term(x, {})[0])(x)
    close(value, 0.9 * 9999)
    close(slope, [[-0.9], [0.9]])


@pytest.mark.parametrize(
    "term",
    [
        DPO(label_smoothing=0.2, beta=1.0),
        DPO(loss_type="ipo", average_tokens=True, beta=1.0),
        DPO(reference=None, average_tokens=True),
    ],
    ids=str,
)
def test_the_contract(term):
    lp, ref, w = numbers(pairs=4)
    mask = np.arange(5) < np.array([5, 3, 4, 1, 2, 2, 0, 0])[:, None]
    batch = jr.TokenBatch.from_arrays(
        mask=mask, weights=jnp.asarray(w, jnp.float32), ref_logprobs=jnp.asarray(ref, jnp.float32)
    )
    jr.testing.check_term(term, jnp.asarray(lp, jnp.float32), batch, rows_together=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(loss_type="hinge"), "'sigmoid', 'ipo'; got 'hinge'"),
        (lambda: DPO(label_smoothing=0.6), "within 0 … 0.5, got 0.6"),
        (lambda: DPO(label_smoothing=np.nan), "within 0 … 0.5"),
        (lambda: DPO(label_smoothing=0.1, loss_type="ipo"), "IPO has none"),
    ],
)
def test_arguments_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("term", [DPO(), DPO(loss_type="ipo"), DPO(average_tokens=True), SimPO()], ids=str)
def test_pairs_of_weight_zero_are_not_there(term):
    lp, ref, _ = numbers(pairs=4)
    weights = np.ones_like(lp)
    weights[4:] = 0
    some = jr.TokenBatch.from_arrays(weights=weights, ref_logprobs=ref)
    fewer = jr.TokenBatch.from_arrays(ref_logprobs=ref[:4])
    (value, _), slope = graded(term, jnp.asarray(lp, jnp.float32), some)
    close(value, graded(term, jnp.asarray(lp[:4], jnp.float32), fewer)[0][0])
    assert not np.asarray(slope[4:]).any()


@pytest.mark.parametrize("how", ["weights", "mask"])
@pytest.mark.parametrize("term", [DPO(), SimPO()], ids=str)
def test_half_a_pair_is_refused(term, how):
    lp, ref, _ = numbers(pairs=2)
    x, there = jnp.asarray(lp, jnp.float32), np.ones_like(lp)
    there[3] = 0
    batch = jr.TokenBatch.from_arrays(**{how: there}, ref_logprobs=ref)
    with pytest.raises(ValueError, match=f"{type(term).__name__}: pair 1 is half a pair"):
        term(x, batch)
    with pytest.raises(ValueError, match="half a pair"):
        jax.grad(lambda x: term(x, batch)[0])(x)
    (value, _), slope = graded(term, x, batch)
    assert np.isnan(value)
    assert np.isnan(slope).any()
    good = jr.TokenBatch.from_arrays(**{how: np.ones_like(lp)}, ref_logprobs=ref)
    both = jax.tree.map(lambda *a: jnp.stack(a), batch, good)
    values = jax.jit(jax.vmap(lambda b: term(x, b)[0]))(both)
    assert np.isnan(values).tolist() == [True, False]


def test_half_a_pair_for_a_server_is_refused_before_anything_is_sent():
    client, data = Recorder(Scripted()), make_data()
    data[3].loss_fn_inputs["weights"][:] = 0
    with pytest.raises(ValueError, match=r"groups of 2, but of the datums 2 … 3 only some"):
        jr.client.forward_backward_custom(client, data, jr.compose(DPO()))
    assert not client.requests
    data[2].loss_fn_inputs["weights"][:] = 0
    jr.client.forward_backward_custom(client, data, jr.compose(DPO())).result()


def datums(lp, ref, lengths):
    return [
        {"logprobs": lp[i, :n], "ref_logprobs": ref[i, :n], "margin": float(i)} for i, n in enumerate(lengths)
    ]


def packed():
    lp, ref, _ = numbers()
    rows = datums(lp, ref, [5, 3, 2, 4, 1, 5])
    return rows, jr.TokenBatch.pack_pairs(rows[0::2], rows[1::2])


def test_pack_pairs_interleaves_and_remembers():
    rows, batch = packed()
    plain = jr.TokenBatch.pack(rows)
    assert batch.pairs.tolist() == [1, -1, 2, -2, 3, -3]
    jax.tree.map(np.testing.assert_array_equal, batch.replace(pairs=None), plain)
    x = jnp.asarray(batch["logprobs"])
    want = graded(DPO(), x, plain)[0][0]
    close(graded(DPO(), x, batch)[0][0], want)
    more = jr.TokenBatch.pack_pairs(rows[0::2], rows[1::2], length_buckets=[16], row_buckets=[10])
    assert more.shape == (10, 16)
    assert more.pairs.tolist() == [1, -1, 2, -2, 3, -3, 0, 0, 0, 0]
    close(graded(DPO(), jnp.asarray(more["logprobs"]), more)[0][0], want)


ORDERS = {
    "all chosen first": [0, 2, 4, 1, 3, 5],
    "the other way round": [1, 0, 3, 2, 5, 4],
    "chosen ones alone": [0, 2],
    "shifted": [1, 2, 3, 4],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("term", [DPO(), SimPO()], ids=str)
def test_rows_that_are_no_pairs_any_more_are_refused(term, order):
    _, batch = packed()
    broken = jax.tree.map(lambda a: a[np.array(order)], batch)
    x = jnp.asarray(broken["logprobs"])
    with pytest.raises(ValueError, match=r"its rows 0 and 1 are no pair"):
        term(x, broken)
    (value, _), slope = graded(term, x, broken)
    assert np.isnan(value)
    assert np.isnan(slope).any()


def test_pairs_stay_pairs_through_everything():
    _, batch = packed()
    x = jnp.asarray(batch["logprobs"])
    want, _ = DPO()(x, batch)
    order = np.array([4, 5, 0, 1, 2, 3])
    close(graded(DPO(), x[order], jax.tree.map(lambda a: a[order], batch))[0][0], want)
    two = jax.tree.map(lambda a: jnp.stack([a, a]), batch)
    close(jax.jit(jax.vmap(lambda b: DPO()(x, b)[0]))(two), [want, want])
    _, values = jax.lax.scan(lambda c, b: (c, DPO()(x, b)[0]), 0, two)
    close(values, [want, want])
    more = batch.with_arrays(extra=np.zeros(batch.shape))
    assert more.pairs.tolist() == batch.pairs.tolist()
    again = pickle.loads(pickle.dumps(batch))
    assert again.pairs.tolist() == batch.pairs.tolist()
    jr.testing.check_term(DPO(), x, batch, rows_together=2)
    (loss, _), _ = jr.compose(DPO()).value_and_grad(x, batch)
    close(loss, want)


def test_batches_pickled_before_pairs_were_remembered_still_load():
    lp, ref, _ = numbers()
    batch = jr.TokenBatch.from_arrays(logprobs=lp, ref_logprobs=ref)
    old = object.__new__(jr.TokenBatch)
    old.__dict__.update({k: getattr(batch, k) for k in ("mask", "weights", "lengths", "arrays")})
    loaded = pickle.loads(pickle.dumps(old))
    assert "pairs" not in vars(loaded)
    close(DPO()(batch["logprobs"], loaded)[0], DPO()(batch["logprobs"], batch)[0])
    assert jax.tree.structure(loaded) == jax.tree.structure(batch)
    assert len(loaded.unpack(loaded["logprobs"])) == 6


def test_a_recording_keeps_pairs_and_present():
    from jaxreg.recorder.recording import from_plain, to_plain

    rows, _ = packed()
    rows = [{**row, "mask": np.arange(len(row["logprobs"])) != 1} for row in rows]
    batch = jr.TokenBatch.pack_pairs(rows[0::2], rows[1::2])
    again = from_plain(to_plain(batch), "batch")
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    assert again.pairs is not None
    assert again.present is not None


def test_pack_pairs_refuses_what_are_no_pairs():
    rows, _ = packed()
    with pytest.raises(ValueError, match="2 chosen and 3 rejected"):
        jr.TokenBatch.pack_pairs(rows[:2], rows[:3])
    with pytest.raises(ValueError, match="even number of rows; the bucket is 7"):
        jr.TokenBatch.pack_pairs(rows[0::2], rows[1::2], row_buckets=[7])
    weighted = [{**row, "weights": np.ones(len(row["logprobs"]))} for row in rows]
    weighted[3]["weights"][:] = 0
    with pytest.raises(ValueError, match="pair 1: its rejected answer has no token that counts"):
        jr.TokenBatch.pack_pairs(weighted[0::2], weighted[1::2])
    weighted[2]["weights"][:] = 0
    batch = jr.TokenBatch.pack_pairs(weighted[0::2], weighted[1::2])
    assert np.isfinite(DPO()(jnp.asarray(batch["logprobs"]), batch)[0])


def test_a_reference_of_probabilities_is_refused():
    lp, _, _ = numbers(pairs=1)
    with pytest.raises(ValueError, match=r"DPO: .*the reference holds 0.9.*take their logarithm"):
        DPO(reference=jnp.full(lp.shape, 0.9))(jnp.asarray(lp), {})


@pytest.mark.parametrize("loss", [jr.losses.DPO, jr.losses.SimPO])
def test_of_logits_they_take_the_answers_tokens(loss):
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(4, 3, 7)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (4, 3)))
    batch = jr.TokenBatch.from_arrays(
        mask=np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool),
        target_tokens=tokens,
        ref_logprobs=jnp.asarray(-rng.uniform(0.1, 2, (4, 3)), jnp.float32),
    )

    def of_logprobs(logits):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return loss()(logprobs, batch)[0]

    (value, _), slope = graded(loss(inputs="logits"), logits, batch)
    right, expected = jax.jit(jax.value_and_grad(of_logprobs))(logits)
    np.testing.assert_allclose(value, right, rtol=1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"logits \[B, T, V\], got shape \(4, 3\)"):
        loss(inputs="logits")(logits[..., 0], batch)
