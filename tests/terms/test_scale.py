"""Directions and norms at any scale that is ordinary: from 1e-18 to 1e18, and vectors that are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr
from jaxreg.terms.scale import directions, norms

SCALES = [1e-18, 1e-9, 1e-3, 1.0, 1e9, 1e18]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("other", [1e-18, 1.0, 1e18])
def test_cosine_does_not_know_scales(scale, other):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 7))
    x, r = (jnp.asarray(v, jnp.float32) for v in (scale * a, other * b))
    term = jr.regularizers.Consistency(reference="r", metric="cosine")
    (value, _), slope = jax.value_and_grad(term, has_aux=True)(x, {"r": r})
    norm = [np.linalg.norm(v, axis=1) for v in (a, b)]
    cos = (a * b).sum(1) / (norm[0] * norm[1])
    close(value, np.mean(1 - cos))
    exact = (cos[:, None] * a / norm[0][:, None] - b / norm[1][:, None]) / norm[0][:, None] / 3
    close(np.asarray(slope, np.float64) * scale, exact, atol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_vectors_have_no_distance_and_no_slope(scale):
    x = scale * jnp.array([[1.0, 2.0, 3.0], [0.1, 0.2, -0.7]])
    value, slope = jax.value_and_grad(
        lambda x: jr.regularizers.Consistency(reference="r", metric="cosine")(x, {"r": 2 * x})[0]
    )(x)
    close(value, 0, atol=1e-12)
    close(scale * slope, 0)


def test_a_zero_vector_is_at_distance_one_and_has_no_slope():
    x, r = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    term = jr.regularizers.Consistency(reference="r", metric="cosine")
    (value, _), slope = jax.value_and_grad(term, has_aux=True)(x, {"r": r})
    assert float(value) == 1.0
    assert not np.asarray(slope).any()


@pytest.mark.parametrize("mode", ["soft", "hard", "spectral"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("scale", SCALES)
def test_orthogonality_does_not_know_scales(scale, axis, mode):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    x[1 if axis == "rows" else slice(None), slice(None) if axis == "rows" else 1] = 0  # one that is absent
    term = jr.regularizers.Orthogonality(mode=mode, axis=axis)
    run = jax.value_and_grad(lambda x: term(x, {})[0])
    (one, slope), (scaled, small) = run(jnp.asarray(x)), run(jnp.float32(scale) * jnp.asarray(x))
    rows = x if axis == "rows" else x.T
    rows = rows[np.abs(rows).max(1) > 0].astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    away = unit @ unit.T - np.eye(len(unit))
    off = away - np.diag(np.diag(away))
    want = {
        "soft": (off**2).sum(),
        "hard": (away**2).sum(),
        "spectral": np.abs(np.linalg.eigvalsh(away)).max(),
    }
    close(one, want[mode])
    close(scaled, want[mode])
    close(np.asarray(small, np.float64) * scale, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_the_gradient_penaltys_norm_is_that_of_any_scale(scale):
    term = jr.regularizers.GradientPenalty(fn=lambda x, b: scale * jnp.sum(x * x, axis=1), target=0.0)
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    _, metrics = term(x, {})
    close(float(metrics["norm"]) / scale, 5.0)
    if 1e-9 <= scale <= 1e9:
        slope = jax.grad(lambda x: term(x, {})[0])(x)
        close(np.asarray(slope, np.float64) / scale**2, [[12.0, 16.0], [0.0, 0.0]])


@pytest.mark.parametrize("scale", [1e-30, *SCALES, 1e30])
def test_norms_and_directions(scale, rng):
    v = rng.normal(size=(5, 6))
    x = jnp.asarray(scale * v, jnp.float32)
    close(np.asarray(norms(x), np.float64) / scale, np.linalg.norm(v, axis=1))
    unit, zero = directions(x)
    close(unit, v / np.linalg.norm(v, axis=1, keepdims=True))
    assert not zero.any()
    close(jax.grad(lambda x: norms(x).sum())(x), v / np.linalg.norm(v, axis=1, keepdims=True))
    nothing = jnp.zeros((2, 3))
    assert directions(nothing)[1].all()
    assert not np.asarray(jax.jacobian(lambda x: directions(x)[0])(nothing)).any()
    assert not np.asarray(jax.jacobian(norms)(nothing)).any()
    assert np.isnan(norms(jnp.array([[jnp.nan, 1.0]]))).all()
