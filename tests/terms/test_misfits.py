"""An array of the batch that does not fit is the fault of itself, and named by the term that reads it."""

import jax.numpy as jnp
import pytest

import jaxreg as jr

X = -jnp.ones((2, 3))
KL = dict(name="kl", fn=jr.regularizers.KL(), weight=1.0)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (2, 3, 4), ()])
def test_a_reference_of_another_length_is_the_complaint_of_the_term_that_reads_it(shape):
    objective = jr.compose(jr.losses.CrossEntropy(), [KL])
    with pytest.raises(
        ValueError, match=r"KL: the reference, 'ref_logprobs', has shape .* but x has \(2, 3\)"
    ) as e:
        objective(X, {"ref_logprobs": -jnp.ones(shape)})
    assert any("term 'kl'" in note for note in e.value.__notes__)


def test_advantages_of_another_length():
    batch = {"advantages": jnp.ones(5), "logprobs": X}
    with pytest.raises(
        ValueError, match=r"the advantages, 'advantages', has shape \(5,\)|'advantages'.*\(5,\)"
    ):
        jr.losses.PPO()(X, batch)


def test_an_array_that_no_term_reads_may_have_any_shape():
    other = {"table": jnp.ones((7, 5)), "scale": 2.0}
    value, _ = jr.losses.CrossEntropy()(X, other)
    assert float(value) == 1.0


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask is \[B, T\], got shape \(2,\)"):
        jr.losses.CrossEntropy()(X, {"mask": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\(B, T\) = \(2, 2\) as in the batch"):
        jr.losses.CrossEntropy()(X, {"mask": jnp.ones((2, 2))})


def test_a_batch_of_arrays_names_the_one_that_is_odd():
    with pytest.raises(ValueError, match=r"'ref' has shape \(2, 2\), but 'x' \(2, 3\): all arrays are"):
        jr.TokenBatch.from_arrays(x=X, ref=-jnp.ones((2, 2)))


def test_a_batch_of_another_length_than_x_says_what_it_holds():
    batch = jr.TokenBatch.from_arrays(ref=-jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"as in the batch, whose arrays are \['mask', 'ref', 'weights'\]"):
        jr.losses.CrossEntropy()(X, batch)


def test_an_array_of_the_batch_asked_for_as_an_attribute():
    batch = jr.TokenBatch.from_arrays(ref_logprobs=X)
    with pytest.raises(AttributeError, match=r"no attribute 'ref_logprobs'; say batch\['ref_logprobs'\]"):
        _ = batch.ref_logprobs
    with pytest.raises(AttributeError, match="no attribute 'nothing'$"):
        _ = batch.nothing
    with pytest.raises(KeyError, match=r"no array 'ref_logprob'; it has .*; did you mean 'ref_logprobs'\?"):
        batch["ref_logprob"]
