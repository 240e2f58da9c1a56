"""Tokens wherever they stand, arrays that are added, and a mask that is not lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clients import Scripted, make_data
from hypothesis import given
from hypothesis import strategies as st

import jaxreg as jr

MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
NUMBERS = np.arange(20.0, dtype=np.float32).reshape(4, 5)


def test_lengths_and_unpack_go_by_the_mask():
    batch = jr.TokenBatch.from_arrays(mask=MASK, x=NUMBERS, reward=np.arange(4.0))
    assert batch.lengths.tolist() == [5, 2, 3, 0]
    assert [a.tolist() for a in batch.unpack(batch["x"])] == [[0, 1, 2, 3, 4], [8, 9], [10, 12, 14]]
    assert [float(r) for r in batch.unpack(batch["reward"])] == [0, 1, 2]
    top = np.stack([NUMBERS, -NUMBERS], -1)
    assert batch.unpack(top)[1].tolist() == [[8, -8], [9, -9]]
    traced = jax.jit(lambda m: jr.TokenBatch.from_arrays(mask=m).lengths)(MASK)
    assert traced.tolist() == [5, 2, 3, 0]


@given(st.integers(0, 10_000))
def test_repack_is_the_inverse_of_unpack(seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (5, 7)).astype(bool)
    mask[0, 3] = True
    batch = jr.TokenBatch.from_arrays(mask=mask)
    for array in (rng.normal(size=(5, 7)), rng.normal(size=(5, 7, 3)), rng.integers(0, 9, (5, 7))):
        real = mask.reshape(mask.shape + (1,) * (array.ndim - 2))
        again = batch.repack(batch.unpack(array))
        np.testing.assert_array_equal(again, np.where(real, array, 0))
        assert again.dtype == array.dtype
    numbers = rng.normal(size=5)
    np.testing.assert_array_equal(batch.repack(batch.unpack(numbers)), np.where(mask.any(1), numbers, 0))


def test_what_does_not_fit_into_repack():
    batch = jr.TokenBatch.from_arrays(mask=MASK)
    with pytest.raises(ValueError, match="one array a datum, 3; got 2"):
        batch.repack([[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"datum 1: expected an array of shape \(2,\), got \(3,\)"):
        batch.repack([np.ones(5), np.ones(3), np.ones(3)])


def test_a_datums_own_mask_leaves_its_tokens_the_datums():
    data = [{"x": [1.0, 2.0, 3.0], "mask": [0, 1, 0]}, {"x": [4.0], "mask": [0]}]
    batch = jr.TokenBatch.pack(data)
    assert batch.lengths[:2].tolist() == [3, 1]
    assert [a.tolist() for a in batch.unpack(batch["x"])] == [[1, 2, 3], [4]]
    assert [a.tolist() for a in batch.unpack(batch.mask)] == [[False, True, False], [False]]
    assert float(batch.mean(batch["x"])) == 2
    plain = jr.TokenBatch.pack([{"x": [1.0, 2.0]}])
    assert plain.present is None


def test_the_server_gets_a_weight_for_every_token_of_a_datum_with_holes():
    client, data = Scripted(), make_data()
    for datum in data:
        datum.loss_fn_inputs["mask"] = np.arange(len(datum.model_input)) % 2 == 0
    jr.client.forward_backward_custom(client, data, jr.losses.CrossEntropy(reduction="token_sum")).result()
    for sent, datum in zip(client.requests[-1][1], data, strict=True):
        mask, own = (datum.loss_fn_inputs[k] for k in ("mask", "weights"))
        np.testing.assert_array_equal(sent.loss_fn_inputs["weights"], mask * own)


def test_a_host_term_sees_the_real_tokens_and_its_gradient_goes_back_to_them():
    seen = []

    def fn(data, x):
        seen.append([(row["x"].tolist(), values.tolist()) for row, values in zip(data, x, strict=True)])
        return 0.0, {}, [np.arange(1.0, len(values) + 1) for values in x]

    batch = jr.TokenBatch.from_arrays(mask=MASK, x=NUMBERS)
    with jr.host.HostRegularizer("fn", fn, 1.0) as term:
        _, slope = jr.compose(lambda x, b: 0.0 * b.sum(x), [term]).value_and_grad(
            jnp.asarray(-NUMBERS), batch
        )
    assert seen[-1][1] == ([8, 9], [-8, -9])
    assert seen[-1][2] == ([10, 12, 14], [-10, -12, -14])
    assert slope.tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 1, 2], [1, 0, 2, 0, 3], [0] * 5]


def test_a_diagnosis_names_the_token_among_the_real_ones():
    from jaxreg.events.log import Inputs

    x = NUMBERS.copy()
    x[1, 4] = np.inf
    batch = jr.TokenBatch.from_arrays(mask=MASK, y=x)
    objective = jr.compose(lambda x, b: b.mean(x * b["y"]))
    finding = jr.telemetry.diagnose(Inputs(objective, jnp.asarray(NUMBERS), batch))[0]
    assert (finding.datum, finding.at) == (1, (1,))


def test_adding_an_array_keeps_mask_and_weights():
    packed = jr.TokenBatch.pack([{"x": [1.0, 2.0], "weights": [0.0, 2.0]}])
    extra = jnp.ones(packed.shape)
    ways = {
        "with_arrays": packed.with_arrays(extra=extra),
        "stars": jr.TokenBatch.from_arrays(**packed, extra=extra),
        "a dict": jr.TokenBatch.from_arrays(**{**packed, "extra": extra}),
        "dict()": jr.TokenBatch.from_arrays(**dict(packed), extra=extra),
    }
    for more in ways.values():
        np.testing.assert_array_equal(more.mask, packed.mask)
        np.testing.assert_array_equal(more.weights, packed.weights)
        np.testing.assert_array_equal(more.lengths, packed.lengths)
        np.testing.assert_array_equal(more["x"], packed["x"])
        np.testing.assert_array_equal(more["extra"], extra)
    x = jnp.arange(16.0).reshape(packed.shape)
    for batch in (packed, {**packed, "extra": extra}, {**packed}, dict(packed)):
        assert float(jr.regularizers.L2(reduction="token_sum")(x, batch)[0]) == 2.0


def test_with_arrays_keeps_the_rest_and_works_traced():
    data = [{"x": [1.0, 2.0], "mask": [0, 1]}, {"x": [1.0], "mask": [1]}]
    batch = jr.TokenBatch.pack_pairs(data[:1], data[1:])
    more = jax.jit(lambda b, e: b.with_arrays(extra=e, reward=e[:, 0], x=e))(batch, jnp.ones(batch.shape))
    assert sorted(more.arrays) == ["extra", "reward", "x"]
    assert more["x"].tolist() == more["extra"].tolist()
    for field in ("mask", "weights", "lengths", "present", "pairs"):
        np.testing.assert_array_equal(getattr(more, field), getattr(batch, field))
    assert sorted(batch.arrays) == ["x"]
    with pytest.raises(ValueError, match=r"with_arrays: arrays are.*\(2, 8\); got {'e': \(2, 7\)}"):
        batch.with_arrays(e=jnp.ones((2, 7)))
    with pytest.raises(ValueError, match="with_arrays: 'mask' is no array beside the others"):
        batch.with_arrays(mask=jnp.ones(batch.shape))


def test_the_mapping_holds_mask_and_weights():
    batch = jr.TokenBatch.from_arrays(weights=jnp.array([[0.0, 2.0]]), x=jnp.zeros((1, 2)))
    assert list(batch) == ["mask", "weights", "x"]
    assert batch["mask"] is batch.mask
    assert batch["weights"] is batch.weights
    assert "lengths" not in batch
