"""Norms now and then: measured by one branch of a conditional, carried in between."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gramian import composed, model, problem

import jaxreg as jr


def run(objective, params, batch, steps, jit=False):
    def step(params, state):
        return objective.value_and_grad(params, batch, state=state)

    step = jax.jit(chex.assert_max_traces(step, n=1)) if jit else step
    state, outs, grads = objective.init(), [], []
    for _ in range(steps):
        (_, out), grad = step(params, state)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grad)
        state = out.state
        outs.append(out)
        grads.append(grad)
    return outs, grads


@pytest.mark.parametrize("space", ["outputs", "params"])
@pytest.mark.parametrize("jit", [False, True])
def test_every_third_step_measures_and_the_others_carry_it(rng, space, jit):
    params, batch = problem(rng)
    norms = jr.GradNorms(wrt=space, gramian=True, absolutes=True)
    now_and_then = jr.GradNorms(wrt=space, gramian=True, absolutes=True, every=3)
    outs, grads = run(composed(now_and_then, on_params=True), params, batch, 7, jit)
    always, same = run(composed(norms, on_params=True), params, batch, 7)
    chex.assert_trees_all_close(grads, same, rtol=1e-4, atol=1e-6)
    assert [int(out.norms_age) for out in outs] == [0, 1, 2, 0, 1, 2, 0]
    assert always[0].norms_age is None
    for k, out in enumerate(outs):
        measured = always[k - k % 3]
        chex.assert_trees_all_close(out.gramian, measured.gramian, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(out.total_grad_norm, measured.total_grad_norm, rtol=1e-4)
        for name, term in out.regularizers.items():
            for field in ("grad_norm", "grad_abs_max", "grad_abs_mean"):
                then = getattr(measured.regularizers[name], field)
                chex.assert_trees_all_close(getattr(term, field), then, rtol=1e-4)
            chex.assert_trees_all_close(term.value, always[k].regularizers[name].value, rtol=1e-4, atol=1e-6)


def test_it_compiles_once_and_scans(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=4))

    def body(carry, _):
        params, state = carry
        (_, out), grad = objective.value_and_grad(params, batch, state=state)
        return (jax.tree.map(lambda p, g: p - 0.01 * g, params, grad), out.state), out.norms_age

    first = objective.init()
    (_, last), ages = jax.lax.scan(body, (params, first), None, 9)
    assert ages.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    chex.assert_trees_all_equal_shapes_and_dtypes(first, last)


def test_the_gradient_in_between_is_the_plain_one(rng):
    params, batch = problem(rng)
    outs, grads = run(composed(jr.GradNorms(every=5), on_params=True), params, batch, 3)
    _, plain = run(composed(False, on_params=True), params, batch, 3)
    chex.assert_trees_all_close(grads, plain, rtol=1e-5, atol=1e-6)


def test_a_step_without_a_gradient_measures_nothing_and_the_next_one_does(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=2))
    _, out = objective(params, batch, state=objective.init())
    assert out.norms_age is None
    (_, out), _ = objective.value_and_grad(params, batch, state=out.state)
    assert int(out.norms_age) == 0


def test_without_its_state_it_says_so(rng):
    params, batch = problem(rng)
    with pytest.raises(ValueError, match=r"GradNorms\(every=2\) carries .*state=objective.init\(\)"):
        composed(jr.GradNorms(every=2)).value_and_grad(params, batch)


def test_the_state_donates_and_is_abstract(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=2, gramian=True))
    step = jax.jit(lambda p, s: objective.value_and_grad(p, batch, state=s), donate_argnums=1)
    (_, out), _ = step(params, objective.init())
    (_, out), _ = step(params, out.state)
    assert int(out.norms_age) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(objective.init), out.state)


def test_float64_and_float32_agree_with_what_is_carried(rng):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            params, batch = problem(rng, dtype)
            outs, grads = run(composed(jr.GradNorms(every=2, gramian=True)), params, batch, 3)
            assert grads[0]["w"].dtype == dtype
            chex.assert_trees_all_equal_shapes_and_dtypes(outs[0], outs[1], outs[2])


def test_vmap_over_params_and_states(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=2))
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    states = jax.tree.map(lambda s: jnp.stack([s, s]), objective.init())
    vmapped = jax.vmap(lambda p, s: objective.value_and_grad(p, batch, state=s))
    (_, out), grads = vmapped(many, states)
    (_, one), grad = objective.value_and_grad(params, batch, state=objective.init())
    chex.assert_trees_all_close(jax.tree.map(lambda g: g[0], grads), grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.total_grad_norm[0], one.total_grad_norm, rtol=1e-5)
    assert model(params, batch)["y"].shape == (6,)


@pytest.mark.parametrize("space", ["outputs", "params"])
def test_a_term_at_weight_0_is_left_out_in_between_too(rng, space):
    params, batch = problem(rng)
    bad = dict(name="bad", fn=lambda out, batch: jnp.sqrt(jnp.sum(out["y"] * 0)), weight=0.0)
    norms = jr.GradNorms(wrt=space, every=2)
    objective = jr.compose(lambda out, batch: jnp.sum(out["y"]), [bad], forward=model, track_grad_norms=norms)
    state = objective.init()
    for _ in range(3):
        (_, out), grads = objective.value_and_grad(params, batch, state=state)
        chex.assert_tree_all_finite(grads)
        state = out.state
