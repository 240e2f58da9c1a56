"""What counts: a token of weight 0 is context, a datum of weight 0 is not there, and places do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from library_cases import CASES, LENGTHS, B, T
from prepared import prepared, value_and_grad

import jaxreg as jr

NAMES = sorted(name for name, case in CASES.items() if case.x != "params")
ROWS = np.arange(B)


def moved(array, places, width, fill):
    """[B, T, ...] in which a datum's tokens stand first, to [B, width, ...] in which they stand at places."""
    array = np.asarray(array)
    if array.shape[:2] != (B, T):
        return array
    kind = array.dtype.kind
    new = np.full(
        (B, width, *array.shape[2:]), fill if kind == "f" else 3 if kind in "iu" else fill, array.dtype
    )
    for row, at in enumerate(places):
        new[row, at] = array[row, : len(at)]
    return new


def at_places(batch, x, places, width, fill, context=False):
    """The batch with its tokens elsewhere; what is between them is padding, or context of weight 0."""
    arrays = {k: jnp.asarray(moved(v, places, width, fill)) for k, v in batch.arrays.items()}
    mask = moved(batch.mask, places, width, False)
    weights = moved(batch.weights, places, width, 0.0)
    if context:
        mask = mask | mask.any(axis=1, keepdims=True)
    other = jr.TokenBatch.from_arrays(mask=mask, weights=jnp.asarray(weights), **arrays)
    return other, jnp.asarray(moved(x, places, width, fill))


def evaluated(name, x, batch):
    """Among so much padding that all are of one shape, and a term compiles once."""
    (rows, width), most = batch.shape, (B + 4, 2 * T)

    def padded(array):
        if array.shape[:2] != (rows, width)[: array.ndim]:
            return array
        more = [(0, m - n) for m, n in zip(most, array.shape, strict=False)]
        return jnp.asarray(np.pad(array, more + [(0, 0)] * (array.ndim - 2)))

    call = value_and_grad(name, reductions(name))
    (value, metrics), gradient = jax.device_get(call(padded(x), jax.tree.map(padded, batch)))
    assert not gradient[rows:].any()
    assert not gradient[:, width:].any()
    return float(value), {k: float(v) for k, v in metrics.items()}, gradient[:rows, :width]


def same(got, want, places):
    """Value, metrics and the gradient at the real tokens; and no gradient bit elsewhere."""
    close(got[0], want[0], rtol=1e-10, atol=1e-12)
    assert got[1].keys() == want[1].keys()
    for name in got[1]:
        close(got[1][name], want[1][name], rtol=1e-10, atol=1e-12)
    elsewhere = np.ones(got[2].shape[:2], bool)
    for row, at in enumerate(places):
        close(got[2][row, at], want[2][row, : len(at)], rtol=1e-9, atol=1e-12)
        elsewhere[row, at] = False
    assert not got[2][elsewhere].any()


def reductions(name):
    return "datum_mean" if "cosine" in name else "token_mean"


@pytest.mark.parametrize("fill", [3.7, np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_datums_of_weight_zero_are_as_if_they_were_not_there(name, fill, x64):
    _, _, x, batch = prepared(name, reductions(name))
    wide = {
        k: jnp.concatenate([v, jnp.full_like(v[:4], fill if v.dtype.kind == "f" else 3)])
        for k, v in batch.arrays.items()
    }
    more = jr.TokenBatch.from_arrays(
        mask=np.concatenate([batch.mask, np.ones((4, T), bool)]),
        weights=jnp.concatenate([batch.weights, jnp.zeros((4, T))]),
        **wide,
    )
    got = evaluated(name, jnp.concatenate([x, jnp.full_like(x[:4], fill)]), more)
    assert not got[2][B:].any()
    same((*got[:2], got[2][:B]), evaluated(name, x, batch), [np.arange(n) for n in LENGTHS])


@pytest.mark.parametrize("fill", [3.7, np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_weight_zero_is_no_part_of_the_answer(name, fill, x64):
    _, _, x, batch = prepared(name, reductions(name))
    places = [2 + np.arange(n) for n in LENGTHS]
    other, prompted = at_places(batch, x, places, T + 2, fill, context=True)
    assert np.asarray(other.mask).sum() > np.asarray(batch.mask).sum()
    same(evaluated(name, prompted, other), evaluated(name, x, batch), places)


@pytest.mark.parametrize("places", ["left", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_may_stand_anywhere(name, places, x64):
    _, _, x, batch = prepared(name, reductions(name))
    rng = np.random.default_rng(3)
    width = 2 * T
    at = [
        np.arange(width - n, width) if places == "left" else np.sort(rng.choice(width, n, replace=False))
        for n in LENGTHS
    ]
    other, elsewhere = at_places(batch, x, at, width, 3.7)
    assert other.lengths.tolist() == LENGTHS.tolist()
    same(evaluated(name, elsewhere, other), evaluated(name, x, batch), at)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("window", [1, 3, 32])
def test_repetition_goes_by_tokens_and_not_by_places(window, context, x64):
    rng = np.random.default_rng(5)
    said = rng.integers(0, 4, (6, 12))
    mask = rng.integers(0, 4, (6, 12)) > 0
    weights = rng.integers(0, 2, (6, 12)) * rng.uniform(0.5, 2, (6, 12)) * mask
    logits = rng.normal(size=(6, 12, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss = np.zeros((6, 12))
    for row in range(6):
        before = []
        for t in np.flatnonzero(mask[row] if context else weights[row]):
            for word in set(before[-window:]) - {said[row, t]}:
                loss[row, t] -= np.log1p(-p[row, t, word])
            before.append(said[row, t])
    batch = jr.TokenBatch.from_arrays(mask=mask, weights=weights, target_tokens=said)
    value, _ = jr.regularizers.Repetition(window=window, context=context)(jnp.asarray(logits), batch)
    close(value, (loss * weights).sum() / weights.sum(), rtol=1e-10)


def test_reductions_of_one_number_a_datum():
    weights = jnp.array([[0.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    batch = jr.TokenBatch.from_arrays(weights=weights, reward=jnp.array([jnp.nan, 1.0, 4.0]))
    assert float(batch.mean(batch["reward"])) == 2.5
    assert float(batch.sum(batch["reward"])) == 5.0
    assert float(batch.datum_mean(batch["reward"])) == 2.5
    assert batch.datum_means(batch["reward"]).tolist() == [0.0, 1.0, 4.0]
    assert jax.grad(batch.mean)(batch["reward"]).tolist() == [0.0, 0.5, 0.5]
    assert batch.counted.tolist() == [[False, False], [False, True], [True, True]]


def test_weights_of_one_number_each_take_numbers_out_one_by_one():
    x = jnp.array([[[1.0, jnp.nan], [9.0, 2.0]]])
    batch = jr.TokenBatch.from_arrays(weights=jnp.array([[[1.0, 0.0], [0.0, 1.0]]]))
    (value, metrics), slope = jax.value_and_grad(jr.regularizers.L2(reduction="token_sum"), has_aux=True)(
        x, batch
    )
    assert float(value) == 5.0
    assert slope.tolist() == [[[2.0, 0.0], [0.0, 4.0]]]
    (_, metrics), _ = jax.value_and_grad(jr.regularizers.L1(), has_aux=True)(x, batch)
    assert float(metrics["max"]) == 2.0  # 9 does not count


def test_a_compiled_objective_with_norms_does_not_see_what_does_not_count():
    rng = np.random.default_rng(0)
    objective = jr.compose(
        jr.losses.DPO(reference="ref"),
        [
            jr.RegularizerSpec(name="length", fn=jr.regularizers.Length(target=1.0), weight=0.3),
            jr.RegularizerSpec(
                name="cosine", fn=jr.regularizers.Consistency(reference="ref", metric="cosine"), weight=0.1
            ),
        ],
        track_grad_norms=True,
    )
    x, ref = (-rng.uniform(0.1, 3, (4, 6)).astype(np.float32) for _ in range(2))
    weights = np.ones((4, 6), np.float32)
    weights[:, :2] = 0  # a prompt
    small = objective.value_and_grad(
        jnp.asarray(x[:2, 2:]), jr.TokenBatch.from_arrays(ref=jnp.asarray(ref[:2, 2:]))
    )
    weights[2:] = 0
    batch = jr.TokenBatch.from_arrays(weights=jnp.asarray(weights), ref=jnp.asarray(ref))
    large = objective.value_and_grad(jnp.asarray(x), batch)
    want = small[0][1].to_flat_dict()
    for name, number in large[0][1].to_flat_dict().items():
        close(number, want[name])
    close(large[1][:2, 2:], small[1])
    assert not np.asarray(large[1][2:]).any()
    assert not np.asarray(large[1][:, :2]).any()
