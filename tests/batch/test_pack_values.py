"""Numbers that are refused where they count, and not looked at where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clients import Scripted, make_data, sft
from helpers import close

import jaxreg as jr

JUNK = {"NaN": np.nan, "+1": 1.0}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("how", ["weights", "mask"])
@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "old_per_token_logps"])
def test_a_placeholder_where_nothing_counts_becomes_zero(junk, how, name):
    data = [{name: [junk, -1.0], how: [0.0, 1.0]}, {name: [-2.0], how: [1.0]}]
    batch = jr.TokenBatch.pack(data)
    assert np.asarray(batch[name])[:2, :2].tolist() == [[0.0, -1.0], [-2.0, 0.0]]
    assert [a.tolist() for a in batch.unpack(batch[name])] == [[0.0, -1.0], [-2.0]]
    # Not even a term that masks nothing itself, and whose derivative is NaN at NaN.
    loss = lambda x: batch.mean(jnp.exp(batch[name] - x))
    slope = jax.grad(loss)(jnp.zeros(batch.shape))
    assert np.isfinite(slope).all()
    data[0][name] = [-1.0, junk]
    with pytest.raises(ValueError, match=rf"datum 0, '{name}': (NaN at \[1\]|logprobs are ≤ 0)"):
        jr.TokenBatch.pack(data)


def test_what_is_refused_where_it_counts_stays_so():
    nan = np.nan
    good = {"x": [1.0, 2.0], "weights": [1.0, 0.0]}
    for bad, message in {
        "x": ([nan, 1.0], r"datum 1, 'x': NaN at \[0\]"),
        "weights": ([1.0, nan], r"datum 1, 'weights': NaN at \[1\]"),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            jr.TokenBatch.pack([good, {**good, bad: message[0]}])
    with pytest.raises(ValueError, match=r"datum 0, 'mask': NaN at \[1\]"):
        jr.TokenBatch.pack([{"x": [1.0, 2.0], "mask": [1.0, nan]}])
    with pytest.raises(ValueError, match="datum 0, 'logprobs': logprobs are ≤ 0, but it holds 0.5"):
        jr.TokenBatch.pack([{"logprobs": [3.0, 0.5], "weights": [0.0, 1.0]}])


def test_a_number_a_datum_and_a_number_a_slot():
    nan = np.nan
    data = [{"x": [1.0], "weights": [0.0], "reward": nan}, {"x": [1.0], "weights": [1.0], "reward": 2.0}]
    batch = jr.TokenBatch.pack(data)
    assert batch["reward"].tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="datum 1, 'reward': NaN at its only value"):
        jr.TokenBatch.pack([data[0], {**data[1], "reward": nan}])
    slots = {"top": [[nan, 1.0]], "weights": [[0.0, 1.0]]}
    assert jr.TokenBatch.pack([slots])["top"][0, 0].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"'top': NaN at \[0, 0\]"):
        jr.TokenBatch.pack([{"top": [[nan, 1.0]], "weights": [1.0]}])
    ids = {"ids": np.array([2**40, 3]), "weights": [0.0, 1.0]}
    assert jr.TokenBatch.pack([ids])["ids"][0, :2].tolist() == [0, 3]


def test_placeholders_never_reach_the_server():
    client, data = Scripted(), make_data()
    for datum in data:
        prompt = datum.loss_fn_inputs["weights"] == 0
        datum.loss_fn_inputs["ref_logprobs"][prompt] = np.nan
    given = [np.where(d.loss_fn_inputs["weights"] == 0, 1.0, -1.0) for d in data]
    result = jr.client.forward_backward_custom(client, data, sft(), logprobs=given).result()
    ((_, sent),) = client.requests
    for datum, own, logprobs in zip(sent, data, result.logprobs, strict=True):
        weights = datum.loss_fn_inputs["weights"]
        assert np.isfinite(weights).all()
        assert not weights[own.loss_fn_inputs["weights"] == 0].any()
        assert logprobs.max() <= 0


PROBABILITIES = jnp.array([[0.5, 0.9], [0.2, 0.1]])


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "ref_logps", "old_log_probs"])
def test_probabilities_in_rectangular_arrays_are_refused(name):
    for make, who in {
        lambda: jr.TokenBatch.from_arrays(**{name: PROBABILITIES}): "TokenBatch.from_arrays",
        lambda: jr.regularizers.L2()(-PROBABILITIES, {name: PROBABILITIES}): "L2",
        lambda: jr.TokenBatch.from_arrays(x=PROBABILITIES).with_arrays(
            **{name: PROBABILITIES}
        ): "with_arrays",
    }.items():
        with pytest.raises(ValueError, match=f"{who}: '{name}': logprobs are ≤ 0, but it holds 0.9"):
            make()


def test_only_what_counts_and_only_numbers_are_looked_at():
    weights = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    arrays = {"logprobs": jnp.array([[-1.0, 0.9], [-0.1, -0.2]])}
    assert jr.TokenBatch.from_arrays(weights=weights, **arrays).shape == (2, 2)
    with pytest.raises(ValueError, match=r"holds 0\.9"):
        jr.TokenBatch.from_arrays(**arrays)
    total = jax.jit(lambda a: jr.TokenBatch.from_arrays(logprobs=a).sum(a))(PROBABILITIES)
    close(total, 1.7)  # traced
    close(jax.jit(lambda: jr.TokenBatch.from_arrays(logprobs=PROBABILITIES).sum(PROBABILITIES))(), 1.7)
    jr.TokenBatch.from_arrays(logprobs=jnp.full((2, 2), 5e-4), probs=PROBABILITIES)  # rounding, another name


def test_whole_distributions_may_be_logits_but_not_probabilities():
    logits = jnp.array([[[0.5, -0.2, 3.0]]])
    jr.TokenBatch.from_arrays(ref_logprobs=logits)
    with pytest.raises(ValueError, match="'ref_logprobs': logprobs are ≤ 0"):
        jr.TokenBatch.from_arrays(ref_logprobs=jax.nn.softmax(logits))
