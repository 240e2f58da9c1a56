"""A reference by its name in the batch, as an array, and as a function of the batch: the same term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from library_cases import CASES, data
from prepared import prepared

import jaxreg as jr
from jaxreg.core import step


def made(name):
    case = CASES[name]
    return case.make("token_mean") if case.reduces else case.make()


# Every term with a field that a reference may stand in, and the name that its case reads it by.
FIELDS = [
    (name, field, getattr(made(name), field))
    for name, case in CASES.items()
    for field in ("reference", "sampler", "advantages")
    if case.x != "params" and isinstance(getattr(made(name), field, None), str)
]


# Of these the sampler weights the gradient, and the value stays the estimator's.
ESTIMATORS = ("Entropy, off-policy", "KL, k3, off-policy")


def variants(name, field, key):
    """The term with its reference given by name, as an array, and as a function."""
    term = made(name)
    array = jnp.asarray(data()[key], jnp.float32)

    def from_batch(batch):
        return batch[key]

    return term, dataclasses.replace(term, **{field: array}), dataclasses.replace(term, **{field: from_batch})


@pytest.mark.parametrize(("name", "field", "key"), FIELDS)
def test_all_three_are_the_same_term(name, field, key):
    _, _, x, batch = prepared(name, "token_mean", np.float32)
    by_name, by_array, by_function = variants(name, field, key)
    expected, slope = jax.value_and_grad(lambda x: by_name(x, batch)[0])(x)
    for other in (by_array, by_function):
        value, gradient = jax.value_and_grad(lambda x, other=other: other(x, batch)[0])(x)
        close(value, expected)
        close(gradient, slope)


@pytest.mark.parametrize(("name", "field", "key"), FIELDS)
def test_an_array_is_an_argument_of_the_program_and_gets_no_gradient(name, field, key):
    _, _, x, batch = prepared(name, "token_mean", np.float32)
    by_name, by_array, _ = variants(name, field, key)
    array = getattr(by_array, field)

    def objective(values):
        return jr.compose(dataclasses.replace(by_array, **{field: values}))

    one, two = objective(array), objective(0.5 * array[..., ::-1])
    assert one.plan is two.plan
    (value_one, _), slope_one = one.value_and_grad(x, batch)
    close(value_one, by_name(x, batch)[0])
    programs = one.plan.compiled(step.value_and_grad)._cache_size()
    (value_two, _), slope_two = two.value_and_grad(x, batch)
    if field == "sampler" and name in ESTIMATORS:
        assert (slope_one != slope_two).any()
    else:
        assert value_one != value_two
    assert one.plan.compiled(step.value_and_grad)._cache_size() == programs
    of_array = jax.grad(lambda values: dataclasses.replace(by_array, **{field: values})(x, batch)[0])
    slope = jax.jit(of_array)(array)
    assert not np.asarray(slope).any()


@pytest.mark.parametrize(("name", "field", "key"), FIELDS)
def test_an_array_of_another_shape_is_refused_with_both_shapes(name, field, key):
    _, _, x, batch = prepared(name, "token_mean", np.float32)
    _, by_array, _ = variants(name, field, key)
    wrong = dataclasses.replace(by_array, **{field: jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(6, 5"):
        wrong(x, batch)


@pytest.mark.parametrize(("name", "field", "key"), FIELDS)
def test_one_number_a_datum_stands_for_its_tokens_in_advantages_only(name, field, key):
    _, _, x, batch = prepared(name, "token_mean", np.float32)
    by_name, _, _ = variants(name, field, key)
    sums = dataclasses.replace(by_name, **{field: -jnp.ones(6)})  # such as a reference's sequence sums
    if field == "advantages":
        value, _ = sums(x, batch)
        close(value, dataclasses.replace(by_name, **{field: -jnp.ones((6, 5))})(x, batch)[0])
        return
    with pytest.raises(ValueError, match=r"has shape \(6,\), but x has"):
        sums(x, batch)


def test_what_is_no_reference_and_no_array_is_named():
    x, batch = jnp.zeros((2, 2)), jr.TokenBatch.from_arrays(mask=jnp.ones((2, 2)))
    with pytest.raises(TypeError, match="KL: the reference is a name .* got NoneType"):
        jr.regularizers.KL(reference=lambda batch: None)(x, batch)
    with pytest.raises(TypeError, match=r"L1: expected an array .* got dict with the fields \['logprobs'\]"):
        jr.regularizers.L1()({"logprobs": x}, batch)
    with pytest.raises(TypeError, match="KL: expected an array .* got list"):
        jr.regularizers.KL()([[0.0]], batch)
