"""GaussianKL: where posteriors stand, what counts of them, free bits, and numbers far from 1."""

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

RNG = np.random.default_rng(0)
MEAN, LOG_VAR = RNG.normal(size=(2, 5, 3)).astype(np.float32)
Term = jr.regularizers.GaussianKL


def exact(mean, log_var, prior_mean=0.0, prior_log_var=0.0):
    """A number a dimension, in float64."""
    mean, log_var, m, v = (np.asarray(a, np.float64) for a in (mean, log_var, prior_mean, prior_log_var))
    return 0.5 * (np.exp(log_var - v) + (mean - m) ** 2 * np.exp(-v) - 1 - (log_var - v))


def graded(term, mean, log_var, batch=None):
    x = (jnp.asarray(mean), jnp.asarray(log_var))
    (value, out), slopes = jr.compose(term).value_and_grad(x, batch)
    return float(value), out.base_loss.custom, [np.asarray(slope, np.float64) for slope in slopes]


class Named(NamedTuple):
    log_var: Any
    mean: Any


@flax.struct.dataclass
class Struct:
    mean: Any
    log_var: Any
    image: Any


@pytest.mark.parametrize(
    ("term", "outputs"),
    [
        (Term(), (MEAN, LOG_VAR)),
        (Term(), [MEAN, LOG_VAR]),
        (Term(), {"mean": MEAN, "log_var": LOG_VAR, "image": MEAN}),
        (Term(), Named(LOG_VAR, MEAN)),
        (Term(), Struct(MEAN, LOG_VAR, MEAN)),
        (Term(mean="q/mu", log_var="q/logvar"), {"q": {"mu": MEAN, "logvar": LOG_VAR}}),
        (jr.of("q", Term()), {"q": (MEAN, LOG_VAR), "image": MEAN}),
        (
            jr.of(lambda out, batch: (out["mean"], 2 * jnp.log(out["scale"])), Term()),
            {"mean": MEAN, "scale": np.exp(LOG_VAR / 2)},
        ),
    ],
)
def test_a_posterior_is_found_in_the_outputs(term, outputs):
    outputs = jax.tree.map(jnp.asarray, outputs)
    (loss, _), slopes = jr.compose(term, track_grad_norms=True).value_and_grad(outputs)
    close(loss, exact(MEAN, LOG_VAR).sum(1).mean())
    chex.assert_trees_all_equal_shapes(slopes, outputs)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        ({"mu": MEAN}, KeyError, r"GaussianKL: dict has no field 'mean'; it has \['mu'\]"),
        (jnp.asarray(MEAN), TypeError, r"got an array \(5, 3\)"),
        ((MEAN, LOG_VAR[:, :2]), ValueError, r"one shape.*\(5, 3\) and \(5, 2\)"),
        ((MEAN[0], LOG_VAR[0]), ValueError, r"one shape, \[B, D\]"),
        ((MEAN, LOG_VAR, MEAN), KeyError, r"tuple has no field 'mean'"),
    ],
)
def test_outputs_without_one_are_told_what_is_missing(outputs, error, message):
    with pytest.raises(error, match=message):
        Term()(outputs, None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"free_bits": -1.0}, ValueError),
        ({"free_bits": float("nan")}, ValueError),
        ({"mean": MEAN}, TypeError),
        ({"reduction": "mean"}, ValueError),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(error, match="GaussianKL"):
        Term(**arguments)


def test_all_axes_of_a_datum_are_its_dimensions():
    want = exact(MEAN, LOG_VAR).sum() / 5
    wide = [np.repeat(a.reshape(5, 3, 1, 1), 4, axis=2) for a in (MEAN, LOG_VAR)]
    for batch in (None, jnp.zeros((5, 28, 28)), {"image": jnp.zeros((5, 28, 28))}):
        close(graded(Term(), *wide, batch)[0], 4 * want)


@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("junk", [3.0, np.nan, np.inf])
def test_a_datum_without_weight_is_as_if_it_were_not_there(name, junk):
    count = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    mean, log_var = (np.where(count[:, None] > 0, a, np.float32(junk)) for a in (MEAN, LOG_VAR))
    some = count > 0
    alone = graded(Term(), mean[some], log_var[some])
    weights = jnp.asarray(count, bool if name == "mask" else None)
    batches = [
        {name: weights},
        {name: jnp.broadcast_to(weights[:, None], (5, 7))},
        jr.TokenBatch.from_arrays(**{name: jnp.broadcast_to(weights[:, None], (5, 7))}),
    ]
    for batch in batches:
        value, metrics, slopes = graded(Term(), mean, log_var, batch)
        close(value, alone[0])
        chex.assert_trees_all_close(metrics, alone[1], rtol=1e-5)
        for slope, want in zip(slopes, alone[2], strict=True):
            close(slope[some], want)
            assert not slope[~some].any()


def test_weights_of_datums_are_those_of_a_mean():
    weights = np.array([0.5, 0.0, 2.0, 1.0, 0.25])
    each = exact(MEAN, LOG_VAR).sum(1)
    batch = {"weights": jnp.asarray(weights)}
    close(Term()((MEAN, LOG_VAR), batch)[0], (weights * each).sum() / weights.sum())
    close(Term(reduction="token_sum")((MEAN, LOG_VAR), batch)[0], (weights * each).sum())
    close(Term(reduction="datum_mean")((MEAN, LOG_VAR), batch)[0], each[weights > 0].mean())


def test_a_datum_of_tokens_counts_once_and_a_token_by_its_weight():
    weights = np.array([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    batch = jr.TokenBatch.from_arrays(weights=jnp.asarray(weights))
    some = weights.any(1)
    close(Term()((MEAN, LOG_VAR), batch)[0], exact(MEAN, LOG_VAR)[some].sum(1).mean())
    mean, log_var = RNG.normal(size=(2, 5, 2, 3)).astype(np.float32)
    each = exact(mean, log_var).sum(-1)
    for same in (batch, {"weights": jnp.asarray(weights)}):
        close(Term()((mean, log_var), same)[0], (weights * each).sum() / weights.sum())
    with pytest.raises(
        ValueError, match=r"the batch's mask has shape \(5, 2\), but the mean begins with \(5, 3"
    ):
        Term()((np.zeros((5, 3, 4)), np.zeros((5, 3, 4))), batch)
    with pytest.raises(ValueError, match=r"weights has shape \(4,\), but the mean begins with \(5,\)"):
        Term()((MEAN, LOG_VAR), {"weights": jnp.ones(4)})


PRIOR_MEAN, PRIOR_LOG_VAR = RNG.normal(size=(2, 5, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("mean", "log_var", "right"),
    [
        ("m", "v", (PRIOR_MEAN, PRIOR_LOG_VAR)),
        (jnp.asarray(PRIOR_MEAN), PRIOR_LOG_VAR, (PRIOR_MEAN, PRIOR_LOG_VAR)),
        (lambda batch: 2 * batch["m"], 0.3, (2 * PRIOR_MEAN, 0.3)),
        (jnp.asarray(PRIOR_MEAN[0]), -1.5, (PRIOR_MEAN[0], -1.5)),
        (1, PRIOR_LOG_VAR[:, :1], (1.0, PRIOR_LOG_VAR[:, :1])),
    ],
)
def test_another_prior(mean, log_var, right):
    term = Term(prior_mean=mean, prior_log_var=log_var)
    batch = {"m": jnp.asarray(PRIOR_MEAN), "v": jnp.asarray(PRIOR_LOG_VAR)}
    value, _, slopes = graded(term, MEAN, LOG_VAR, batch)
    close(value, exact(MEAN, LOG_VAR, *right).sum(1).mean())
    m, v = (np.asarray(a, np.float64) for a in right)
    close(slopes[0], (MEAN - m) * np.exp(-v) / 5)
    close(slopes[1], np.expm1(LOG_VAR - v) / 2 / 5, rtol=1e-4)
    assert term == Term(prior_mean=mean, prior_log_var=log_var)
    hash(term)


def test_a_posterior_that_is_the_prior_is_at_0_without_a_slope():
    term = Term(prior_mean="m", prior_log_var="v")
    value, metrics, slopes = graded(term, MEAN, LOG_VAR, {"m": MEAN, "v": LOG_VAR})
    assert value == float(metrics["nats"]) == 0.0
    assert not any(slope.any() for slope in slopes)


def test_a_prior_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"prior_mean has shape \(4,\), which does not broadcast"):
        Term(prior_mean=jnp.zeros(4))((MEAN, LOG_VAR), None)
    with pytest.raises(KeyError, match=r"no array 'm' \(prior_mean\)"):
        Term(prior_mean="m")((MEAN, LOG_VAR), {"image": MEAN})


def test_arrays_of_a_prior_are_arguments_of_the_program():
    one, two = (jr.compose(Term(prior_mean=m)) for m in (jnp.zeros(3), jnp.ones(3)))
    assert one.plan is two.plan
    x = (jnp.asarray(MEAN), jnp.asarray(LOG_VAR))
    assert float(one(x)[0]) != float(two(x)[0])


def test_the_prior_gets_no_gradient():
    def of_prior(m):
        return Term(prior_mean=m, prior_log_var=m)((MEAN, LOG_VAR), None)[0]

    assert not np.asarray(jax.grad(of_prior)(jnp.ones((5, 3)))).any()


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum", "datum_mean"])
def test_free_bits_are_of_the_batchs_mean(reduction):
    weights = np.array([0.5, 0.0, 2.0, 1.0, 0.25])
    each = exact(MEAN, LOG_VAR)
    w = (weights > 0).astype(float) if reduction == "datum_mean" else weights
    means = (w[:, None] * each).sum(0) / w.sum()
    floor = np.sort(means)[1] + 1e-3  # two dimensions are below
    want = np.maximum(means, floor).sum() * (weights.sum() if reduction == "token_sum" else 1.0)
    term = Term(free_bits=float(floor), reduction=reduction)
    value, metrics, slopes = graded(term, MEAN, LOG_VAR, {"weights": jnp.asarray(weights)})
    close(value, want)
    assert float(metrics["nats"]) < value
    for slope in slopes:
        assert (slope[0] != 0).tolist() == (means > floor).tolist()


def test_on_the_edge_of_free_bits_the_gradient_is_whole():
    mean, log_var = np.full((1, 2), 2.0, np.float32), np.zeros((1, 2), np.float32)  # 2 nats each, exactly
    for free_bits, slope in ((2.0, 2.0), (2.0001, 0.0), (1.9999, 2.0)):
        value, _, slopes = graded(Term(free_bits=free_bits), mean, log_var)
        close(value, 2 * max(2.0, free_bits))
        assert slopes[0].tolist() == [[slope, slope]]


SCALES = [0.0, 1e-18, 1e-6, 1.0, 1e6, 1e18]
LOG_VARS = [-100.0, -30.0, -1e-5, 0.0, 3e-3, 0.1, 30.0, 87.0, 100.0]


def test_every_ordinary_number_is_finite_and_right():
    grid = np.meshgrid(SCALES, LOG_VARS, [-100.0, 0.0, 100.0], indexing="ij")
    mean, log_var, prior = (
        a.reshape(-1, 1, 1).astype(np.float32) for a in grid
    )  # one datum of one dimension

    def run(mean, log_var, prior):
        return jax.value_and_grad(Term(prior_log_var=prior), has_aux=True)((mean, log_var), None)

    (value, metrics), slopes = jax.jit(jax.vmap(run))(mean, log_var, prior)
    mean, log_var, prior = (a.astype(np.float64) for a in (mean, log_var, prior))
    d = log_var - prior
    excess = np.where(np.abs(d) < 1e-4, d * d / 2, np.expm1(d) - d)
    wants = (
        (excess + np.square(mean * np.exp(-prior / 2))) / 2,
        mean * np.exp(-prior),
        np.expm1(d) / 2,
    )
    most, least = 8e37, 1e-37  # above and below, float32 has no such number
    for answer, right in zip((value, *slopes), wants, strict=True):
        got, want = np.asarray(answer, np.float64).ravel(), right.ravel()
        assert np.isfinite(got).all()
        assert (got[want > most] > most / 10).all()
        held = np.abs(want) < most
        close(got[held], want[held], rtol=1e-4, atol=least)
    close(metrics["nats"], value)


def test_many_huge_ones_are_a_finite_sum():
    x = jnp.full((64, 1000), 1e18), jnp.full((64, 1000), 90.0)
    value, metrics, slopes = graded(Term(reduction="token_sum"), *x)
    assert np.isfinite(value)
    assert np.isfinite(metrics["nats"])
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_near_the_prior_it_has_all_its_digits_and_is_never_below_0():
    log_var = np.geomspace(1e-7, 0.2, 200).astype(np.float32)
    log_var = np.concatenate([log_var, -log_var])[:, None]
    each = jax.jit(jax.vmap(lambda v: Term()((jnp.zeros((1, 1)), v[None]), None)[0]))(jnp.asarray(log_var))
    d = log_var[:, 0].astype(np.float64)
    series = d**2 / 4 * (1 + d / 3 + d**2 / 12 + d**3 / 60 + d**4 / 360 + d**5 / 2520 + d**6 / 20160)
    close(each, series, rtol=1e-5, atol=0)
    assert (np.asarray(each) >= 0).all()
    slope = jax.grad(lambda v: Term(reduction="token_sum")((jnp.zeros_like(v), v), None)[0])(
        jnp.asarray(log_var)
    )
    close(slope[:, 0], np.expm1(d) / 2, rtol=1e-6, atol=0)


def test_in_bfloat16_it_is_computed_in_float32():
    x = tuple(jnp.asarray(a, jnp.bfloat16) for a in (MEAN, LOG_VAR))
    value, metrics, slopes = graded(Term(), *x)
    close(value, exact(*x).sum(1).mean())
    assert metrics["nats"].dtype == jnp.float32
    assert all(slope.dtype == jnp.bfloat16 for slope in jax.grad(lambda x: Term()(x, None)[0])(x))
    far = graded(Term(), *(jnp.full((2, 2), s, jnp.bfloat16) for s in (1e18, 100.0)))
    assert all(np.isfinite(slope).all() for slope in far[2])


def test_nothing_that_has_diverged_is_hidden():
    for bad in (np.nan, np.inf):
        for x in ((MEAN * bad, LOG_VAR), (MEAN, LOG_VAR + bad)):
            value, _, slopes = graded(Term(free_bits=0.5), *x)
            assert not np.isfinite(value)
            if bad == np.inf:
                assert not any(np.isnan(slope).any() for slope in slopes)


def test_active_units_vary_from_datum_to_datum():
    mean = jnp.asarray(RNG.normal(size=(50, 4)) * [1.0, 0.0, 0.05, 0.3] + [0.0, 5.0, 0.0, 0.0], jnp.float32)
    _, metrics = Term()((mean, jnp.zeros_like(mean)), None)
    assert float(metrics["active_units"]) == 2.0  # one is always 5, and one varies by 0.05


def test_under_vmap_and_twice_differentiated():
    x = jnp.asarray(MEAN), jnp.asarray(LOG_VAR)
    one = jax.jit(jax.vmap(lambda m, v: Term()((m[None], v[None]), None)[0]))(*x)
    close(one, exact(MEAN, LOG_VAR).sum(1))
    second = jax.jit(jax.hessian(lambda v: Term()((jnp.zeros((1, 2)), v), None)[0]))(
        jnp.asarray([[0.3, -1.0]])
    )
    close(second[0, :, 0], np.diag(np.exp([0.3, -1.0]) / 2))


def test_it_is_a_frozen_dataclass():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Term().free_bits = 1.0
