"""Many weight settings of one objective in one program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gramian import base, composed, problem

import jaxreg as jr


def test_a_stack_trains_every_setting_as_it_would_alone(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=2))
    settings = [objective.with_weights({"a": w, "c": v}) for w, v in [(0.0, 1.0), (0.5, 0.0), (2.0, 0.1)]]
    settings.append(objective.without("a"))
    many = jr.stack(settings)
    traced = chex.assert_max_traces(lambda o, p, s: o.value_and_grad(p, batch, state=s), n=1)
    step = jax.jit(jax.vmap(traced))
    params_of = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
    states = many.init()
    for _ in range(3):
        (_, out), grads = step(many, params_of, states)
        params_of = jax.tree.map(lambda p, g: p - 0.05 * g, params_of, grads)
        states = out.state
    for k, setting in enumerate(settings):
        own, state = params, setting.init()
        for _ in range(3):
            (_, one), grad = setting.value_and_grad(own, batch, state=state)
            own, state = jax.tree.map(lambda p, g: p - 0.05 * g, own, grad), one.state
        chex.assert_trees_all_close(jax.tree.map(lambda p, k=k: p[k], params_of), own, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda p, k=k: p[k], out), one, rtol=1e-4, atol=1e-6)


def test_it_says_what_it_is():
    objective = composed(False)
    many = jr.stack([objective.with_weights({"a": w}) for w in (0.0, 1.0)])
    assert many.stacked == 2
    assert objective.stacked is None
    assert "a stack of 2 settings of CompositeLoss" in repr(many)
    assert "[0, 1]" in repr(many)
    assert "[0, 1]" in many._repr_html_()


def test_called_without_vmap_it_says_so(rng):
    params, batch = problem(rng)
    many = jr.stack([composed(False)] * 3)
    for call in (many, many.value_and_grad, many.eval_shape, jax.jit(many.value_and_grad)):
        with pytest.raises(ValueError, match="a stack of 3 settings, over which jax.vmap runs"):
            call(params, batch)


def test_what_is_no_setting_of_the_same_objective_is_refused():
    objective = composed(False)
    other = jr.compose(base, [dict(name="a", fn=base, weight=1.0)])
    for settings, message in [
        ([], "at least one"),
        ([objective, 3], "number 1 is int"),
        ([objective, other], r"objective 1 is not a setting of objective 0: its terms are \['a'\]"),
        ([objective, composed(True)], "another function|track_grad_norms"),
        (objective, r"stack\(\[objective.with_weights"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            jr.stack(settings)


def test_numbers_of_terms_and_aggregators_may_differ(rng):
    from test_aggregate import Tilt

    params, batch = problem(rng)
    build = lambda power: jr.compose(base, [dict(name="b", fn=base, weight=1.0)], aggregator=Tilt(power))
    x = {"y": jnp.asarray(rng.normal(size=6), jnp.float32)}
    many = jr.stack([build(1.0), build(3.0)])
    (_, out), grads = jax.vmap(lambda o: o.value_and_grad(x, batch))(many)
    _, one = build(3.0).value_and_grad(x, batch)
    np.testing.assert_allclose(grads["y"][1], one["y"], rtol=1e-6)
