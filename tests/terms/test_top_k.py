"""The losses on a teacher's top-K, and the generalized Jensen–Shannon divergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

special = pytest.importorskip("scipy.special")
L, R = jr.losses, jr.regularizers
LOSSES = [L.KLTopK, L.ReverseKLTopK]


def parts(mass, k=4, seed=0, rows=64):
    """Logprobs [1, rows, k] whose probabilities sum to the mass."""
    p = np.random.default_rng(seed).dirichlet(np.ones(k), (1, rows)) * mass
    return np.log(p)


def bucketed(lp):
    p = np.exp(lp)
    return np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1)


def oracle(make, tail, x, q):
    """A number a token, from the formula, in NumPy."""
    if tail == "ignore":
        return (np.exp(q) * (q - x)).sum(-1) if make is L.KLTopK else (np.exp(x) * (x - q)).sum(-1)
    p, q = (special.softmax(a, -1) if tail == "renormalize" else bucketed(a) for a in (x, q))
    return special.rel_entr(q, p).sum(-1) if make is L.KLTopK else special.rel_entr(p, q).sum(-1)


@functools.cache
def value_and_slope(make, tail, reduction="token_mean"):
    """One program for all numbers of one shape; out of jit every operation were one."""
    term = make(tail=tail, reduction=reduction)
    return jax.jit(jax.value_and_grad(lambda a, t: term(a, {"teacher_logprobs": t})[0]))


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("make", LOSSES)
def test_of_itself_it_is_0_and_of_others_never_below(make, tail, mass):
    x, other = (jnp.asarray(parts(mass, seed=s), jnp.float32) for s in (0, 1))
    take = value_and_slope(make, tail)
    for teacher, is_zero in ((x, True), (x + 1e-4, False), (other, False)):
        for row in range(0, 64, 8):
            value, slope = take(x[:, row : row + 8], teacher[:, row : row + 8])
            assert float(value) >= 0
            assert np.isfinite(slope).all()
            if is_zero:
                close(value, 0.0)


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("tail", ["renormalize", "bucket", "ignore"])
@pytest.mark.parametrize("make", LOSSES)
def test_it_is_the_formula(make, tail, mass):
    x, q = parts(mass), parts(min(1.1 * mass, 0.99), seed=3)
    x, q = jnp.asarray(x, jnp.float32), jnp.asarray(q, jnp.float32)
    value, _ = value_and_slope(make, tail, "token_sum")(x, q)
    close(value, oracle(make, tail, np.float64(x), np.float64(q)).sum(), rtol=1e-4)


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("make", LOSSES)
def test_its_gradient_is_the_values(make, tail, x64):
    x, q = jnp.asarray(parts(0.7, rows=3)), jnp.asarray(parts(0.8, seed=5, rows=3))

    def loss(x):
        return take(x, q)[0]

    take = value_and_slope(make, tail)
    slope, step = np.asarray(take(x, q)[1]), 1e-6
    for i in np.ndindex(x.shape):
        close(
            slope[i], (loss(x.at[i].add(step)) - loss(x.at[i].add(-step))) / (2 * step), rtol=1e-5, atol=1e-8
        )


def test_the_bucket_is_never_above_the_whole(x64):
    rng = np.random.default_rng(2)
    p, q = (special.log_softmax(rng.normal(size=(1, 50, 9)) * 2, -1) for _ in range(2))
    whole = special.rel_entr(np.exp(q), np.exp(p)).sum(-1)
    take = value_and_slope(L.KLTopK, "bucket")
    for row in range(50):
        x, teacher = (jnp.asarray(a[:, row : row + 1, :4]) for a in (p, q))
        assert float(take(x, teacher)[0]) <= whole[0, row] + 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("make", LOSSES)
def test_a_sum_that_rounding_puts_above_1(make, dtype):
    x = jnp.log(jnp.full((1, 1, 3), 1 / 3, jnp.float32)).astype(dtype) + jnp.asarray(1e-3, dtype)
    value, slope = value_and_slope(make, "bucket")(x, jnp.log(jnp.array([[[0.5, 0.3, 0.1]]])))
    assert np.isfinite(value)
    assert value > 0
    assert np.isfinite(np.asarray(slope, np.float32)).all()


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "ignore"])
@pytest.mark.parametrize("make", LOSSES)
def test_slots_without_a_token(make, tail):
    x, q = parts(0.6, rows=1), parts(0.5, seed=4, rows=1)
    q[..., 1] = -np.inf
    nothing = np.full_like(q, -np.inf)
    take = value_and_slope(make, tail)
    for teacher in (q, nothing):
        value, slope = take(jnp.asarray(x, jnp.float32), jnp.asarray(teacher, jnp.float32))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
    if make is L.ReverseKLTopK:  # the slot is no word: as if it were not there
        kept = [0, 2, 3]
        short, _ = take(*(jnp.asarray(a[..., kept], jnp.float32) for a in (x, q)))
        close(take(*(jnp.asarray(a, jnp.float32) for a in (x, q)))[0], short)


def test_a_tail_that_is_none_is_refused():
    with pytest.raises(ValueError, match="tail is one of 'renormalize', 'bucket', 'ignore'"):
        L.KLTopK(tail="drop")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_js_is_trls_formula(beta, x64):
    rng = np.random.default_rng(0)
    student, teacher = (special.log_softmax(rng.normal(size=(2, 3, 5)), -1) for _ in range(2))
    if beta == 0:
        want = (np.exp(teacher) * (teacher - student)).sum(-1)
    elif beta == 1:
        want = (np.exp(student) * (student - teacher)).sum(-1)
    else:
        both = np.stack([student + np.log1p(-beta), teacher + np.log(beta)])
        mixture = special.logsumexp(both, axis=0)
        of_teacher = (np.exp(teacher) * (teacher - mixture)).sum(-1)
        of_student = (np.exp(student) * (student - mixture)).sum(-1)
        want = beta * of_teacher + (1 - beta) * of_student
    term = R.JS(beta=beta)
    arrays = {"ref_logprobs": jnp.asarray(teacher)}
    close(term(jnp.asarray(student), arrays)[0], want.mean(), rtol=1e-10)
    close(R.JS(beta=beta)(jnp.asarray(teacher), arrays)[0], 0.0)
    with pytest.raises(ValueError, match="beta is within 0 … 1"):
        R.JS(beta=1.5)
