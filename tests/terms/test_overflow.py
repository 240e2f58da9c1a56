"""Log-ratios of ±100 are ordinary input: values, gradients and metrics are finite, right if they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

L, R = jr.losses, jr.regularizers
POLICY = [L.ImportanceSampling(), L.PPO(), L.PPO(dual_clip=3.0), L.CISPO(), L.DRO(), L.GSPO()]
TERMS = [*POLICY, R.KL(estimator="k1"), R.KL(estimator="k2"), R.KL(), R.LogRatioL2()]
SUMMED = [R.KL(estimator=k, reduction="token_sum") for k in ("k1", "k2", "k3")]
EXACT = [R.Entropy(), R.LogRatioL2(gradient="score"), R.KL(gradient="score"), R.KL(sampler="logprobs")]


def batch(s, a, **more):
    s = jnp.asarray(s, jnp.float32)
    return jr.TokenBatch.from_arrays(
        logprobs=s, ref_logprobs=s, advantages=jnp.broadcast_to(jnp.asarray(a, jnp.float32), s.shape), **more
    )


def run(term, x, batch, norms=True):
    (value, out), slope = jr.compose(term, track_grad_norms=norms).value_and_grad(
        jnp.asarray(x, jnp.float32), batch
    )
    return float(value), out, np.asarray(slope)


@pytest.mark.parametrize("a", [1.0, 0.0, -7.0])
@pytest.mark.parametrize("term", [*TERMS, *SUMMED, *EXACT], ids=str)
def test_everything_is_finite(term, a):
    lp, s = np.full((2, 4), -0.5), np.full((2, 4), -100.0)
    s[1] = [-1.0, -0.5, -120.0, -0.2]
    lp[1, 3] = -130.0
    for x, other in ((lp, s), (s, lp)):
        _, out, slope = run(term, x, batch(other, a), norms=False)
        assert np.isfinite(slope).all()
        assert "nonfinite" not in out.to_dict()


def test_the_clipped_side_is_exact_beside_an_overflow():
    x, s = [[-0.5, -1.0]], [[-100.0, -1.0]]
    value, _, slope = run(L.PPO(reduction="token_sum"), x, batch(s, 1.0))
    close(value, -2.2)
    close(slope, [[0.0, -1.0]])
    value, _, slope = run(L.PPO(reduction="token_sum"), x, batch(s, 0.0))
    assert value == 0
    assert not slope.any()
    value, _, slope = run(L.PPO(dual_clip=3.0, reduction="token_sum"), x, batch(s, -1.0))
    close(value, 4.0)
    close(slope, [[0.0, 1.0]])
    value, _, slope = run(L.GSPO(reduction="token_sum"), [[-0.5, -0.5]], batch([[-300.0, -1.0]], 1.0))
    close(value, -2.4)
    assert not slope.any()


@pytest.mark.parametrize("d", [60.0, 80.0, 87.0, 88.0])
def test_what_float32_holds_is_right(d):
    value, out, slope = run(L.ImportanceSampling(), [[-1.0]], batch([[-1.0 - d]], -1.0), norms=False)
    close(value, np.exp(d), rtol=1e-4, atol=0)
    close(slope, [[np.exp(d)]], rtol=1e-4, atol=0)
    for name in ("ratio_mean", "ratio_max", "ratio_min"):
        close(out.base_loss.custom[name], np.exp(d), rtol=1e-4, atol=0)
    close(out.base_loss.custom["kl"], np.exp(d), rtol=1e-4, atol=0)


def test_beyond_it_the_ratio_saturates_without_a_gradient():
    value, out, slope = run(L.ImportanceSampling(), [[-1.0]], batch([[-101.0]], -1.0), norms=False)
    close(value, np.exp(88.0), rtol=1e-4, atol=0)
    assert not slope.any()


def test_a_sum_of_large_ratios_saturates_and_keeps_its_gradient():
    x = jnp.full((1, 8), -1.0)
    value, _, slope = run(
        L.ImportanceSampling(reduction="token_sum"), x, batch(jnp.full((1, 8), -88.9), 1.0), norms=False
    )
    assert value == -np.finfo(np.float32).max
    close(slope, np.full((1, 8), -np.exp(np.float32(-1.0) + np.float32(88.9))), rtol=1e-4, atol=0)


def test_ordinary_ratios_beside_a_large_one_are_averaged_right():
    x, s = [[-1.0, -2.0, -3.0]], [[-81.0, -2.5, -3.5]]
    _, out, _ = run(L.PPO(), x, batch(s, 1.0))
    close(out.base_loss.custom["ratio_mean"], np.exp([80.0, 0.5, 0.5]).mean(), rtol=1e-4, atol=0)
    close(out.base_loss.custom["ratio_min"], np.exp(0.5))


@pytest.mark.parametrize("term", POLICY, ids=str)
def test_padding_and_weight_0_never_enter_an_extreme(term):
    x = jnp.array([[-1.0, -1.0, -0.1, -50.0]])
    arrays = batch(
        [[-1.5, -1.2, -90.0, -0.1]],
        1.0,
        mask=jnp.array([[True, True, True, False]]),
        weights=jnp.array([[1.0, 2.0, 0.0, 1.0]]),
    )
    metrics = term(x, arrays)[1]
    if isinstance(term, L.GSPO):
        close([metrics["ratio_max"], metrics["ratio_min"]], np.exp([0.35, 0.35]))
    else:
        close([metrics["ratio_max"], metrics["ratio_min"]], np.exp([0.5, 0.2]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_in_narrow_dtypes_and_under_vmap_and_scan(dtype):
    xs = jnp.asarray([[[-0.5, -1.0]], [[-100.0, -1.0]]], dtype)
    s = jnp.asarray([[-100.0, -1.0]], dtype)

    def grad(x):
        arrays = {"logprobs": s, "advantages": jnp.ones((1, 2))}
        return jax.value_and_grad(lambda x: L.PPO()(x, arrays)[0])(x)

    loop = [grad(x) for x in xs]
    for run in (jax.vmap(grad), jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, grad(x)), None, xs)[1])):
        values, slopes = run(xs)
        close(values, [v for v, _ in loop])
        close(slopes, np.stack([np.asarray(g, np.float32) for _, g in loop]))


def test_perplexity_saturates():
    x = jnp.array([[-200.0, -100.0]])
    for term in (L.CrossEntropy(), R.Entropy()):
        assert np.isfinite(term(x, {})[1]["perplexity"])
    assert np.isinf(L.CrossEntropy()(jnp.array([[-jnp.inf]]), {})[1]["perplexity"])


def test_float64_has_its_own_range(x64):
    x, s = jnp.array([[-1.0]]), jnp.array([[-301.0]])
    value = L.ImportanceSampling()(x, {"logprobs": s, "advantages": -jnp.ones((1, 1))})[0]
    close(value, np.exp(300.0), rtol=1e-9, atol=0)
