"""The Gramian of the terms' weighted gradients, in both spaces, against one jax.grad a term in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxreg as jr
from jaxreg.core.gramian import power_of_two

WEIGHTS = {"a": 0.7, "b": 0.0, "c": 3.0}


def model(params, batch):
    return {"y": jnp.tanh(batch @ params["w"]) @ params["v"], "z": jnp.sin(params["v"])}


def base(out, batch):
    return jnp.mean(jnp.square(out["y"] - 1))


def a(out, batch):
    return jnp.sum(out["y"] * out["z"][0])


def b(out, batch):
    return jnp.sum(out["z"])


def c(out, batch):
    return -jnp.mean(out["y"]) + jnp.sum(out["z"] ** 2)


def decay(params, batch):
    return jnp.sum(params["w"] ** 2)


TERMS = {"a": a, "b": b, "c": c}


def problem(rng, dtype=jnp.float32):
    params = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=(5,))}
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params), jnp.asarray(rng.normal(size=(6, 4)), dtype)


def composed(norms, scales=None, on_params=False, **rest):
    scales = scales or dict.fromkeys(TERMS, 1.0)
    terms = [
        dict(name=n, fn=lambda out, batch, f=f, s=scales[n]: s * f(out, batch), weight=WEIGHTS[n])
        for n, f in TERMS.items()
    ]
    if on_params:
        terms.insert(1, dict(name="decay", fn=decay, weight=0.1, on="params"))
    return jr.compose(base, terms, forward=model, track_grad_norms=norms, **rest)


def rows(objective, params, batch, space, scales=None):
    """One jax.grad a term, weighted, in float64."""
    scales = scales or dict.fromkeys(TERMS, 1.0)
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), (params, batch))
        found = []
        for name in ("base_loss", *objective.names):
            weight = 1.0 if name == "base_loss" else float(objective.weights()[name]) * scales.get(name, 1.0)
            fn = {"base_loss": base, "decay": decay, **TERMS}[name]
            if name == "decay":
                if space == "outputs":
                    continue
                tree = jax.grad(fn)(params, batch)
            elif space == "outputs":
                tree = jax.grad(fn)(model(params, batch), batch)
            else:
                tree = jax.grad(lambda p, fn=fn: fn(model(p, batch), batch))(params)
            found.append(weight * np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
    return np.stack(found)


def agree(got, vectors, tolerance=1e-5):
    want = vectors @ vectors.T
    size = np.sqrt(np.diagonal(want))
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= tolerance * np.outer(size, size) + 0.0)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 9])
@pytest.mark.parametrize("space", ["outputs", "params"])
def test_it_is_that_of_one_gradient_a_term(rng, space, chunk_size):
    if space == "outputs" and chunk_size:
        return
    params, batch = problem(rng)
    norms = jr.GradNorms(wrt=space, gramian=True, chunk_size=chunk_size)
    objective = composed(norms, on_params=True)
    (loss, out), grads = objective.value_and_grad(params, batch)
    vectors = rows(objective, params, batch, space)
    agree(out.gramian, vectors)
    assert out.gramian_terms == tuple(
        n for n in ("base_loss", *objective.names) if space == "params" or n != "decay"
    )
    norms_of = {"base_loss": out.base_loss.grad_norm} | {
        n: t.grad_norm_weighted for n, t in out.regularizers.items()
    }
    lengths = [float(norms_of[n]) for n in out.gramian_terms]
    np.testing.assert_allclose(np.diagonal(out.gramian), np.square(lengths), rtol=1e-6)
    # Nothing else of the step depends on it.
    plain = composed(jr.GradNorms(wrt=space), on_params=True)
    (_, without), same = plain.value_and_grad(params, batch)
    chex.assert_trees_all_close(grads, same, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(out.total_grad_norm, without.total_grad_norm, rtol=1e-5)


@pytest.mark.parametrize("space", ["outputs", "params"])
def test_in_float64(rng, space):
    with jax.enable_x64(True):
        params, batch = problem(rng, jnp.float64)
        objective = composed(jr.GradNorms(wrt=space, gramian=True))
        (_, out), _ = objective.value_and_grad(params, batch)
        assert out.gramian.dtype == jnp.float64
        agree(out.gramian, rows(objective, params, batch, space), 1e-12)


@pytest.mark.parametrize("space", ["outputs", "params"])
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e17])
def test_at_any_scale(rng, space, scale):
    params, batch = problem(rng)
    scales = {"a": scale, "b": 1.0, "c": 1.0}
    objective = composed(jr.GradNorms(wrt=space, gramian=True), scales)
    (_, out), _ = objective.value_and_grad(params, batch)
    vectors = rows(objective, params, batch, space, scales)
    agree(out.gramian, vectors, 2e-5)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    want = unit @ unit.T
    np.testing.assert_allclose(out.cosines(), np.where(np.eye(4, dtype=bool), 1, want), atol=2e-5)


def test_a_term_at_weight_0_has_no_row_though_its_gradient_be_nan(rng):
    params, batch = problem(rng)
    bad = dict(name="bad", fn=lambda out, batch: jnp.sqrt(jnp.sum(out["y"] * 0)), weight=0.0)
    for space in ("outputs", "params"):
        objective = jr.compose(
            base, [bad], forward=model, track_grad_norms=jr.GradNorms(wrt=space, gramian=True)
        )
        (_, out), grads = objective.value_and_grad(params, batch)
        assert np.isfinite(out.gramian).all()
        assert float(out.gramian[1, 1]) == 0
        assert float(out.cosines()[0, 1]) == 0
        chex.assert_tree_all_finite(grads)
        (_, out), _ = objective.with_weights({"bad": 1.0}).value_and_grad(params, batch)
        assert np.isnan(out.gramian[1]).all()
        assert np.isfinite(out.gramian[0, 0])


def test_of_some_params_only(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(params="v", gramian=True))
    (_, out), _ = objective.value_and_grad(params, batch)
    vectors = rows(objective, params, batch, "params")
    agree(out.gramian, vectors[:, :5])  # v comes first: dicts are sorted


def test_under_jit_vmap_and_scan(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(wrt="params", gramian=True, absolutes=True))
    (_, want), _ = objective.value_and_grad(params, batch)
    (_, got), _ = jax.jit(objective.value_and_grad)(params, batch)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-6)
    batches = jnp.stack([batch, batch * 2])
    (_, many), _ = jax.vmap(objective.value_and_grad, (None, 0))(params, batches)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], many), want, rtol=2e-5, atol=1e-6)
    assert many.cosines().shape == (2, 4, 4)
    _, steps = jax.lax.scan(lambda p, b: (p, objective.value_and_grad(p, b)[0][1]), params, batches)
    chex.assert_trees_all_close(steps.gramian, many.gramian, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="more than one step"):
        many.conflicts()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_absolutes_are_the_largest_and_the_mean_magnitude(rng, chunk_size):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(absolutes=True, chunk_size=chunk_size), on_params=True)
    (_, out), _ = objective.value_and_grad(params, batch)
    vectors = np.abs(rows(objective, params, batch, "params"))
    for k, (name, weight) in enumerate([("base_loss", 1.0), *objective.weights().items()]):
        term = out.base_loss if name == "base_loss" else out.regularizers[name]
        if float(weight):
            np.testing.assert_allclose(term.grad_abs_max * weight, vectors[k].max(), rtol=1e-5)
            np.testing.assert_allclose(term.grad_abs_mean * weight, vectors[k].mean(), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 7])
def test_in_chunks_all_is_as_at_once(rng, chunk_size):
    params, batch = problem(rng)
    got = composed(jr.GradNorms(chunk_size=chunk_size), on_params=True).value_and_grad(params, batch)
    want = composed(True, on_params=True).value_and_grad(params, batch)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_forward_that_cannot_be_vmapped_goes_term_by_term(rng):
    @jax.custom_vjp
    def strange(x):
        return x * 2

    def back(_, g):
        shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
        return (jax.pure_callback(lambda g: np.asarray(g) * 2, shape, g),)

    strange.defvjp(lambda x: (x * 2, None), back)

    def build(norms):
        term = dict(name="l2", fn=lambda x, batch: jnp.sum(x**2), weight=0.5)
        return jr.compose(
            lambda x, batch: jnp.sum(x), [term], forward=lambda p, b: strange(p), track_grad_norms=norms
        )

    x = jnp.asarray(rng.normal(size=5), jnp.float32)
    with pytest.raises(Exception, match="chunk_size=1"):
        build(True).value_and_grad(x)
    (_, out), grads = build(jr.GradNorms(chunk_size=1, gramian=True)).value_and_grad(x)
    np.testing.assert_allclose(grads, 2 + 4 * x, rtol=1e-6)
    np.testing.assert_allclose(out.gramian[0, 0], 4 * 5, rtol=1e-6)


def test_conflicts_are_named_the_worst_first():
    def pull(direction):
        return lambda x, batch: jnp.sum(x * jnp.asarray(direction))

    terms = [
        dict(name=name, fn=pull(direction), weight=1.0)
        for name, direction in {"with": [1.0, 1.0], "across": [0.0, 1.0], "against": [-1.0, 0.1]}.items()
    ]
    objective = jr.compose(pull([1.0, 0.0]), terms, track_grad_norms=jr.GradNorms(gramian=True))
    (_, out), _ = objective.value_and_grad(jnp.zeros(2))
    pairs = out.conflicts()
    assert [(p.first, p.second) for p in pairs] == [("base_loss", "against"), ("with", "against")]
    assert pairs[0].cosine == pytest.approx(-1 / np.sqrt(1.01))
    assert out.conflicts(below=-0.9) == pairs[:1]
    with pytest.raises(TypeError, match="cosines\\(\\) may be traced"):
        jax.jit(lambda x: objective.value_and_grad(x)[0][1].conflicts())(jnp.zeros(2))
    (_, none), _ = jr.compose(pull([1.0, 0.0])).value_and_grad(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"GradNorms\(gramian=True\)"):
        none.cosines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(every=0), "every is the number of steps .* at least 1; got 0"),
        (dict(every=2.0), "a whole number; got 2.0"),
        (dict(chunk_size=0), "chunk_size .* at least 1"),
        (dict(chunk_size=True), "whole number"),
        (dict(wrt="outputs", chunk_size=2), "use wrt='params'"),
        (dict(every=2, per_datum=True), "leave every= or per_datum= out"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jr.GradNorms(**arguments)


def test_chunks_need_a_model():
    with pytest.raises(ValueError, match="chunk_size parts the pullback"):
        jr.compose(base, track_grad_norms=jr.GradNorms(chunk_size=2))


@settings(max_examples=200)
@given(st.floats(float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max), width=32))
def test_the_power_of_two_is_exact(norm):
    found = float(power_of_two(jnp.float32(norm)))
    assert np.frexp(found)[0] == 0.5
    if 2.0**-126 <= norm < 2.0**126:
        assert found <= norm < 2 * found
    assert np.isfinite(np.float32(1) / np.float32(found))


def test_float32_where_float64_is_on_and_one_term_alone():
    with jax.enable_x64(True):
        for terms in ([], [dict(name="a", fn=lambda x, batch: -jnp.sum(x), weight=1.0)]):
            objective = jr.compose(
                lambda x, batch: jnp.sum(x**2), terms, track_grad_norms=jr.GradNorms(gramian=True)
            )
            (_, out), _ = objective.value_and_grad(jnp.array([3.0, 4.0], jnp.float32))
            assert float(out.gramian[0, 0]) == pytest.approx(100.0)
