"""Rows that hold several datums give what rows of one datum give: every term, every reduction."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec as P
from library_cases import CASES
from prepared import prepared

import jaxreg as jr

B, T = 6, 5
NAMES = [
    *("CrossEntropy", "GSPO", "DPO", "KLTopK", "Entropy", "Unlikelihood"),
    *("Repetition", "Repetition, window", "Length", "Consistency", "Consistency, cosine", "GaussianKL"),
    *(
        "Orthogonality, soft, rows",
        "Orthogonality, spectral, columns",
        "GradientPenalty",
        "L2, mean, clipped",
    ),
]
ORDER = [(0, 0), (1, 0), (0, 5), (2, 0), (1, 3), (0, 8)]  # the row of each datum, and where in it it begins
LENGTHS = [5, 3, 3, 4, 1, 0]


def packed(batch, x):
    """The batch's rows, and x, in three rows of ten tokens."""
    ids = np.zeros((3, 10), np.int32)
    for i, ((row, at), n) in enumerate(zip(ORDER, LENGTHS, strict=True)):
        ids[row, at : at + n] = i + 1

    def put(array):
        array = np.asarray(array)
        if array.ndim < 2:
            return jnp.asarray(array)
        made = np.zeros((3, 10, *array.shape[2:]), array.dtype)
        for i, ((row, at), n) in enumerate(zip(ORDER, LENGTHS, strict=True)):
            made[row, at : at + n] = array[i, :n]
        return jnp.asarray(made)

    arrays = {name: put(array) for name, array in batch.arrays.items()}
    made = jr.TokenBatch.from_arrays(
        mask=put(batch.mask), weights=put(batch.weights), segment_ids=ids, datums=B, **arrays
    )
    return made, put(x)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_are_loose_rows(name):
    case = CASES[name]
    with jax.enable_x64(True):
        _, term, x, batch = prepared(name, "datum_mean" if case.reduces else "", np.float64)
        mask = np.arange(T) < np.asarray(LENGTHS)[:, None]
        weights = np.random.default_rng(3).choice([0.0, 0.5, 1.0, 2.0], (B, T))
        weights[:, 0] = 1.0  # both answers of a pair count
        if case.pairs:
            mask[4:] = False
        loose = jr.TokenBatch.from_arrays(mask=mask, weights=weights, **batch.arrays)
        row_batch, rows = packed(loose, x)
        take = jax.jit(jax.value_and_grad(term, has_aux=True))
        (value, metrics), gradient = take(x, loose)
        (got, told), slope = take(rows, row_batch)
        chex.assert_trees_all_close((got, told), (value, metrics), rtol=1e-10, atol=1e-12)
        for i, ((row, at), n) in enumerate(zip(ORDER, LENGTHS, strict=True)):
            np.testing.assert_allclose(slope[row, at : at + n], gradient[i, :n], rtol=1e-8, atol=1e-12)
        if (
            not case.pairs
            and getattr(case.make("token_mean") if case.reduces else case.make(), "additive", 0) is True
        ):
            own = row_batch.with_arrays(own_x=rows).split(2, reweighted=("unwanted",))
            total = sum(take(part["own_x"], part)[0][0] for part in own)
            np.testing.assert_allclose(total, value, rtol=1e-10, atol=1e-12)


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        {"x": rng.normal(size=n).astype(np.float32), "k": rng.normal(size=(n, 2)).astype(np.float32),
         "reward": np.float32(rng.normal()), "weights": rng.integers(0, 3, n).astype(np.float32)}
        for n in lengths
    ]  # fmt: skip


@given(ragged())
def test_packing_loses_nothing_and_reduces_alike(data):
    loose, rows = jr.TokenBatch.pack(data), jr.TokenBatch.pack(data, rows="packed")
    for name in ("x", "k", "reward"):
        for got, datum in zip(rows.unpack(rows[name]), data, strict=True):
            np.testing.assert_array_equal(got, datum[name])
    np.testing.assert_array_equal(rows.repack(rows.unpack(rows["x"])), rows["x"])
    assert rows.mask.size <= loose.mask.size
    count = len(data)
    for reduce in ("datum_sum", "datum_means"):
        got, want = (getattr(batch, reduce)(batch["x"])[:count] for batch in (rows, loose))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for reduce in ("sum", "mean", "datum_mean"):
        for name in ("x", "reward"):
            got, want = (getattr(batch, reduce)(batch[name]) for batch in (rows, loose))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_short_answers_share_rows():
    data = [{"x": np.ones(n)} for n in (100, 30, 30, 30, 60, 40)]
    batch = jr.TokenBatch.pack(data, rows="packed", length_buckets=[100])
    assert batch.shape == (4, 100)
    assert batch.lengths.tolist() == [100, 30, 30, 30, 60, 40]
    assert batch.segment_ids[1, 0] == 2
    assert "6 datums, 290 tokens, padded to 4 × 100" in repr(batch)
    assert {**batch}.keys() == {"mask", "weights", "segment_ids", "lengths", "x"}
    assert jr.regularizers.L1(reduction="datum_mean")(batch["x"], {**batch})[0] == 1
    assert jr.TokenBatch.from_arrays(**batch).datums == 6


def test_pairs_are_packed_into_one_row_and_stay_there():
    chosen, rejected = [{"x": np.ones(n)} for n in (9, 2, 3)], [{"x": np.zeros(n)} for n in (8, 3, 1)]
    batch = jr.TokenBatch.pack_pairs(chosen, rejected, rows="packed", length_buckets=[10, 20])
    assert batch.shape[1] == 20
    x = jnp.asarray(batch["x"]) - 2.0
    loose = jr.TokenBatch.pack_pairs(chosen, rejected)
    want = jr.losses.SimPO()(jnp.asarray(loose["x"]) - 2.0, loose)[0]
    np.testing.assert_allclose(jr.losses.SimPO()(x, batch)[0], want, rtol=1e-6)
    total = sum(jr.losses.SimPO()(part["x"] - 2.0, part)[0] for part in batch.split(2))
    np.testing.assert_allclose(total, want, rtol=1e-6)
    moved = batch.replace(segment_ids=np.asarray([[1] * 5 + [0] * 15, [2] * 5 + [0] * 15], np.int32))
    with pytest.raises(ValueError, match=r"datums 0 to 1 belong together .* into the parts \[0, 1\]"):
        moved.split(2)


@pytest.mark.parametrize(
    ("ids", "more", "error", "message"),
    [
        ([[1, 2, 1]], {}, ValueError, "segment 1 is not contiguous"),
        ([[1, 1, 0], [1, 2, 2]], {}, ValueError, "segment 1 is not contiguous"),
        ([[1.0, 2.0]], {}, TypeError, r"segment_ids are whole numbers \[B, T\], got float64"),
        ([[-1, 1]], {}, ValueError, "numbers from 1 on, and 0 for none; got -1"),
        ([[1, 3]], {"datums": 2}, ValueError, "go up to 3, but there is room for 2 datums"),
        ([[1, 2]], {"reward": np.ones(1)}, ValueError, "go up to 2, but there is room for 1 datum"),
        ([[1, 2]], {"x": np.ones((2, 2))}, ValueError, "'x' has shape"),
    ],
)
def test_bad_segments_are_refused(ids, more, error, message):
    with pytest.raises(error, match=message):
        jr.TokenBatch.from_arrays(segment_ids=np.asarray(ids), **more)


def test_traced_segments_want_to_know_how_many():
    ids = jnp.asarray([[1, 1, 2]])
    with pytest.raises(ValueError, match="segment_ids are traced.* say datums="):
        jax.jit(lambda ids: jr.TokenBatch.from_arrays(segment_ids=ids).lengths)(ids)
    lengths = jax.jit(lambda ids: jr.TokenBatch.from_arrays(segment_ids=ids, datums=3).lengths)(ids)
    assert lengths.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="rows is 'loose' .* or 'packed' .*got 'dense'"):
        jr.TokenBatch.pack([{"x": [1.0]}], rows="dense")


def test_norms_a_datum_go_by_datum():
    data = [{"x": np.linspace(-1, 1, n), "reward": float(n)} for n in (3, 5, 2, 4)]
    objective = jr.compose(
        lambda x, batch: batch.datum_mean(x**2),
        [dict(name="cube", fn=lambda x, batch: batch.sum(x**3), weight=1.0, additive=True)],
        track_grad_norms=jr.GradNorms(per_datum=True),
    )
    loose, rows = jr.TokenBatch.pack(data), jr.TokenBatch.pack(data, rows="packed")
    (_, want), _ = objective.value_and_grad(jnp.asarray(loose["x"], jnp.float32), loose)
    (_, got), _ = objective.value_and_grad(jnp.asarray(rows["x"], jnp.float32), rows)
    for term, like in (
        (got.base_loss, want.base_loss),
        (got.regularizers["cube"], want.regularizers["cube"]),
    ):
        np.testing.assert_allclose(term.grad_norm_per_datum, like.grad_norm_per_datum, rtol=1e-6)
        np.testing.assert_allclose(term.grad_norm, like.grad_norm, rtol=1e-6)


def test_packed_rows_accumulate():
    data = [{"x": np.linspace(-1, 1, n)} for n in (3, 5, 2, 4, 7, 1)]
    rows = jr.TokenBatch.pack(data, rows="packed")
    objective = jr.compose(
        jr.of(lambda x, batch: x, jr.regularizers.L2(reduction="datum_mean")),
        forward=lambda w, batch: w * batch["x"],
        track_grad_norms=jr.GradNorms(wrt="outputs", per_datum=True),
    )
    want = objective.value_and_grad(jnp.float32(2.0), rows)
    got = jr.accumulate(objective, jnp.float32(2.0), rows, steps=2)
    chex.assert_trees_all_close(got, want, rtol=1e-5)


def test_check_term_tries_rows_that_hold_several_datums():
    rng = np.random.default_rng(0)
    data = [{"x": -rng.uniform(0.1, 2, n), "reward": rng.normal()} for n in (5, 3, 2, 4)]
    batch = jr.TokenBatch.pack(data, rows="packed")
    jr.testing.check_term(jr.regularizers.L2(reduction="datum_mean"), batch["x"], batch, additive=True)

    def by_row(x, batch):
        return batch.mean(jnp.sum(batch.where(x), axis=1, keepdims=True) * batch.mask)

    with pytest.raises(
        jr.testing.TermCheckError, match="rows may hold several datums: .* by its segment_ids"
    ):
        jr.testing.check_term(by_row, batch["x"], batch)
    with pytest.raises(ValueError, match=r"or \[N\] = \(4,\) with .* got {'adv': \(3,\)}"):
        batch.with_arrays(adv=np.ones(3))


def test_numbers_of_datums_are_not_cut_with_the_rows():
    data = [{"x": np.full(n, float(n)), "reward": float(n)} for n in (4, 4, 4, 4, 2, 2, 1, 3)]
    batch = jr.TokenBatch.pack(data, rows="packed", length_buckets=[4], row_buckets=[8])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def mean(batch):
        batch = batch.with_totals(axis_name="data")
        return jax.lax.psum(batch.datum_mean(batch["x"]), "data")

    def over(specs):
        return jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=(specs,), out_specs=P()))(batch)

    with pytest.raises(
        ValueError, match=r"several of 8 datums, .* was cut to \[4\]: .* in_specs=jax.tree.map"
    ):
        over(P("data"))
    specs = jax.tree.map(lambda a: P("data") if a.ndim > 1 else P(), batch)
    np.testing.assert_allclose(over(specs), batch.datum_mean(batch["x"]), rtol=1e-6)


def test_few_rows_are_asked_for_though_there_are_many_datums():
    batch = jr.TokenBatch.pack([{"x": np.ones(2)}] * 12, rows="packed", length_buckets=[8], row_buckets=[4])
    assert batch.shape == (4, 8)
    whole = jr.compose(jr.losses.SimPO(), forward=lambda w, batch: -w * batch["x"])
    ids = np.asarray([[1, 2, 3, 0], [4, 0, 0, 0]], np.int32).repeat(2, axis=1)
    apart = jr.TokenBatch.from_arrays(x=np.ones((2, 8)), segment_ids=ids)
    with pytest.raises(ValueError, match=r"datums 2 to 3 belong together .* into the parts \[0, 1\]"):
        jr.accumulate(whole, jnp.ones(()), apart, steps=2)
