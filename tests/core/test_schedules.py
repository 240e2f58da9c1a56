"""A schedule that goes below 0: rounding is tolerated, the rest is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr

X = jnp.array([1.0, 2.0])


def composed(schedule, norms=False):
    return jr.compose(
        lambda x, batch: jnp.sum(x),
        [
            dict(name="falls", fn=lambda x, batch: jnp.sum(x**2), weight=schedule),
            dict(name="fixed", fn=lambda x, batch: jnp.sum(x), weight=0.5),
        ],
        track_grad_norms=norms,
    )


FALLING = optax.linear_schedule(0.1, -0.1, 10)


def at(objective, step):
    return objective.init() | {"step": jnp.asarray(step, jnp.int32)}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_a_negative_weight_is_named_and_not_taken_for_0(norms, jit):
    objective = composed(FALLING, norms)
    step = objective.value_and_grad
    if jit:
        step = jax.jit(lambda x, state: objective.value_and_grad(x, state=state))
    (loss, out), gradient = step(X, state=at(objective, 4))
    np.testing.assert_allclose(out.regularizers["falls"].weight, 0.02, rtol=1e-5)
    assert "nonfinite" not in out.to_dict()
    (loss, out), gradient = step(X, state=at(objective, 8))
    assert out.to_dict()["nonfinite"] == ["falls"]
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


def test_rounding_is_tolerated():
    schedule = optax.linear_schedule(0.1, 0.0, 3)
    objective = composed(lambda step: schedule(step) - 3e-8)
    _, out = objective(X, state=at(objective, 3))
    assert out.regularizers["falls"].weight == 0
    assert "nonfinite" not in out.to_dict()


def test_where_numbers_are_concrete_it_is_an_error():
    objective = composed(FALLING)
    with pytest.raises(ValueError, match=r"term 'falls': its schedule gives -0\.06\d*, and a weight is ≥ 0"):
        objective.weights(at(objective, 8))
    with pytest.raises(ValueError, match="term 'falls': its schedule gives -0.5"):
        composed(lambda step: step * 0.0 - 0.5)


def test_what_warns_and_what_diagnoses_name_the_weight(recwarn):
    objective = composed(FALLING)
    state = at(objective, 8)
    _, out = objective(X, state=state)
    inputs = jr.telemetry.Inputs(objective, X, None, state)
    assert [str(f) for f in jr.telemetry.diagnose(inputs)] == ["the weight of the term 'falls': nan"]
    told = []
    with jr.telemetry.attached(jr.telemetry.Warnings(), told.append):
        jr.telemetry.log(out, step=8, inputs=inputs)
    (warning,) = [event.metadata["message"] for event in told if event.name == "warning"]
    assert warning == "term 'falls' is not finite. First: the weight of the term 'falls': nan"


def test_held_at_a_constant_the_schedule_does_not_count():
    objective = composed(FALLING).with_weights({"falls": 0.3})
    _, out = objective(X, state=at(objective, 8))
    assert out.regularizers["falls"].weight == pytest.approx(0.3)
