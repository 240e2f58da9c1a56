"""Sampled-token estimators: their expected gradients, by enumeration of a vocabulary, in float64.

Every word stands in the batch once, weighted by the probability that it is drawn with: so a sum over tokens
is the expectation itself, and its gradient the expected gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

R = jr.regularizers
Z = np.array([0.3, 1.0, -1.2, 0.1, -3.0])
REF = np.array([1.0, 0.0, 0.5, -0.7, 0.2])
DRAWN = np.array([-0.5, 0.4, 0.9, 0.0, -1.0])  # another sampler's logits


def log_softmax(z):
    return z - np.log(np.exp(z).sum())


def quantity(name):
    """Of logits z, in JAX: what the estimators estimate."""
    log_q = jax.nn.log_softmax(jnp.asarray(REF))

    def value(z):
        log_p = jax.nn.log_softmax(z)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        return {
            "KL(p‖q)": jnp.sum(p * (log_p - log_q)),
            "KL(q‖p)": jnp.sum(q * (log_q - log_p)),
            "H": -jnp.sum(p * log_p),
            "2·KL(p‖q)": 2 * jnp.sum(p * (log_p - log_q)),
            "E g²": jnp.sum(p * (log_p - log_q) ** 2),
            "nothing": 0.0 * jnp.sum(z),
        }[name]

    return value


TERMS = [
    (lambda **kw: R.Entropy(**kw), None, "H"),
    (lambda **kw: R.Entropy(**kw), "score", "H"),
    (lambda **kw: R.Entropy(**kw), "pathwise", "nothing"),
    (lambda **kw: R.KL(estimator="k1", **kw), None, "KL(p‖q)"),
    (lambda **kw: R.KL(estimator="k1", **kw), "pathwise", "nothing"),
    (lambda **kw: R.KL(estimator="k2", **kw), None, "KL(p‖q)"),
    (lambda **kw: R.KL(estimator="k2", **kw), "score", "KL(p‖q)"),
    (lambda **kw: R.KL(estimator="k3", **kw), None, "KL(q‖p)"),
    (lambda **kw: R.KL(estimator="k3", **kw), "score", "KL(p‖q)"),
    (lambda **kw: R.LogRatioL2(**kw), None, "2·KL(p‖q)"),
    (lambda **kw: R.LogRatioL2(**kw), "score", "E g²"),
]


def made(make, gradient, **more):
    given = {} if gradient is None else {"gradient": gradient}
    return make(reduction="token_sum", **given, **more)


def batch_of(drawn, dtype=jnp.float64):
    log_s = log_softmax(drawn)
    arrays = {"ref_logprobs": log_softmax(REF), "s": log_s}
    cast = {k: jnp.asarray(v, dtype)[None] for k, v in arrays.items()}
    return jr.TokenBatch.from_arrays(weights=jnp.asarray(np.exp(log_s), dtype)[None], **cast)


def expected_gradient(term, batch, z):
    return jax.grad(lambda z: term(jax.nn.log_softmax(z)[None], batch)[0])(z)


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize(("make", "gradient", "name"), TERMS)
def test_the_expected_gradient_is_that_of_the_quantity(make, gradient, name, off, x64):
    z = jnp.asarray(Z)
    term = made(make, gradient, **({"sampler": "s"} if off else {}))
    got = expected_gradient(term, batch_of(DRAWN if off else Z), z)
    close(got, jax.grad(quantity(name))(z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("make", "gradient", "name"), TERMS)
def test_the_sampler_being_the_model_changes_nothing(make, gradient, name, x64):
    z = jnp.asarray(Z)
    on, off = made(make, gradient), made(make, gradient, sampler="s")
    close(
        expected_gradient(on, batch_of(Z), z), expected_gradient(off, batch_of(Z), z), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("make", "gradient", "name"), TERMS)
def test_the_value_is_the_same_whatever_the_gradient(make, gradient, name, x64):
    x = jnp.asarray(log_softmax(Z))[None]
    values = [
        made(make, g, **more)(x, batch_of(DRAWN))
        for g in ("score", "pathwise")
        for more in ({}, {"sampler": "s"})
    ]
    for value, metrics in values[1:]:
        close(value, values[0][0], rtol=1e-12)
        for key, metric in metrics.items():
            close(metric, values[0][1][key], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
def test_through_an_objective_and_a_model(norms, dtype):
    """The same in a compiled step, of logits of which the model's tokens are picked."""
    terms = [
        dict(name="entropy", fn=R.Entropy(reduction="token_sum"), weight=1.0),
        dict(name="kl", fn=R.KL(estimator="k1", reduction="token_sum"), weight=1.0),
    ]
    objective = jr.compose(
        lambda x, batch: 0.0 * jnp.sum(x),
        terms,
        forward=lambda z, batch: jax.nn.log_softmax(z)[None],
        track_grad_norms=norms,
    )
    z = jnp.asarray(Z, dtype)
    (_, out), gradient = objective.value_and_grad(z, batch_of(Z, jnp.float32))
    total = jax.grad(lambda z: quantity("H")(z) + quantity("KL(p‖q)")(z))(z.astype(jnp.float32))
    close(
        gradient,
        total,
        rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4,
        atol=2e-2 if dtype == jnp.bfloat16 else 1e-6,
    )
    if norms:
        slope = jax.grad(quantity("H"))(z.astype(jnp.float32))
        close(out.regularizers["entropy"].grad_norm, np.linalg.norm(slope), rtol=3e-2)


def test_vmap_and_scan_give_what_a_loop_gives():
    term, batch = R.Entropy(sampler="s"), batch_of(DRAWN, jnp.float32)
    points = jnp.asarray(np.stack([Z, REF, DRAWN]), jnp.float32)

    def grad(z):
        return expected_gradient(term, batch, z)

    loop = np.stack([grad(z) for z in points])
    close(jax.vmap(grad)(points), loop)
    close(jax.lax.scan(lambda c, z: (c, grad(z)), None, points)[1], loop)


def test_a_large_importance_ratio_stays_finite():
    x, s = jnp.array([[-0.5, -1.0]]), jnp.array([[-200.0, -1.0]])
    for term in (R.Entropy(sampler="s"), R.KL(sampler="s"), R.LogRatioL2(sampler="s", gradient="score")):
        batch = {"s": s, "ref_logprobs": jnp.array([[-150.0, -2.0]])}
        (value, metrics), slope = jax.value_and_grad(term, has_aux=True)(x, batch)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
        assert all(np.isfinite(m) for m in metrics.values())


def test_a_token_that_the_sampler_could_not_draw_gets_no_gradient():
    x, s = jnp.array([[-0.5, -1.0]]), jnp.array([[-jnp.inf, -1.0]])
    slope = jax.grad(lambda x: R.Entropy(sampler="s", reduction="token_sum")(x, {"s": s})[0])(x)
    close(slope, [[0.0, 1.0]])


def test_arguments_of_sampled_tokens_are_refused_for_whole_distributions():
    z = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match="Entropy: gradient and sampler are of sampled-token"):
        R.Entropy(gradient="score")(z, {})
    with pytest.raises(ValueError, match="KL: gradient and sampler are of sampled tokens"):
        R.KL(reference=z, sampler="s")(z, {})
    with pytest.raises(ValueError, match="gradient is one of 'score', 'pathwise'"):
        R.KL(gradient="reinforce")


def test_k3_is_bounded_where_the_user_says():
    x, batch = jnp.array([[-1.0, -30.0]]), {"ref_logprobs": jnp.array([[-2.0, -1.0]])}
    term = R.KL(max_log_ratio=20.0, reduction="token_sum")
    value, slope = jax.value_and_grad(lambda x: term(x, batch)[0])(x)
    close(value, np.exp(-1.0) + (np.exp(20.0) - 21), rtol=1e-6)
    close(slope, [[1 - np.exp(-1.0), 0.0]])
    assert float(jax.grad(lambda x: R.KL()(x, batch)[0])(x)[0, 1]) < -1e12
    with pytest.raises(ValueError, match="max_log_ratio is within 0 … 88"):
        R.KL(max_log_ratio=100.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_largest_is_the_largest_though_all_be_negative(estimator):
    x = jnp.array([[-3.0, -4.0, -0.1]])
    batch = jr.TokenBatch.from_arrays(
        weights=jnp.array([[1.0, 1.0, 0.0]]), ref_logprobs=jnp.array([[-1.0, -1.0, -9.0]])
    )
    d = np.array([2.0, 3.0])
    want = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[estimator].max()
    close(R.KL(estimator=estimator)(x, batch)[1]["max"], want)
