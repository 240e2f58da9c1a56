"""Each rule against its paper's equation in float64 NumPy, and what all rules have in common."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rule_cases import CASES

import jaxreg as jr
from jaxreg.core.named import Regularizers
from jaxreg.core.output import BaseLossOutput, CustomLossOutput, RegularizerOutput

W = jr.weighting
TERMS = ("a", "b", "c")
ALL = {name: rule for name, (rule, _) in CASES.items()} | {
    "schedule": W.schedule("a", optax.linear_schedule(0.0, 1.0, 10)),
    "ema": W.ema(W.gradient_balance("a", "b"), 0.8),
    "clip": W.clip(W.adaptive_kl("a", target=0.8), 0.5, 2.0),
    "warmup": W.warmup(W.gradient_share("a"), 5),
    "every": W.every(W.dual_ascent("b", bound=1.0), 3),
    "freeze": W.freeze(W.softadapt(), 7),
    "normalize": W.normalize(W.gradient_balance(), 2.0),
    "chain": W.chain(W.adaptive_kl("a", target=0.8), W.gradient_balance("b", "c")),
}


def output(values, norms, absolutes, age=None, dtype=jnp.float32):
    """A step's output of these numbers [K], the base loss first."""
    v, n, big, mean = (jnp.asarray(x, dtype) for x in (values, norms, *absolutes))
    rest = lambda k: dict(
        grad_norm=n[k], grad_abs_max=big[k], grad_abs_mean=mean[k], custom={"ntk_trace": v[k] ** 2}
    )
    terms = Regularizers(
        (name, RegularizerOutput(name=name, value=v[k], weight=v[k], contribution=v[k], **rest(k)))
        for k, name in enumerate(TERMS, 1)
    )
    base = BaseLossOutput(v[0], **rest(0))
    return CustomLossOutput(v[0], base, terms, v[0], norms_age=age)


def numbers(rng, steps=100):
    draw = lambda: np.exp(rng.normal(0, 0.4, (steps, 4)))
    return draw(), draw(), (draw() * 3, draw())


def run(rule, v, n, a, dtype=jnp.float32):
    """The weights [steps, its terms] after every step, from one scan."""
    rule = rule.bind(TERMS)
    weights, state = rule.init(dict.fromkeys(TERMS, jnp.ones((), dtype)))

    def step(carry, numbers):
        weights, state = carry
        moved = rule.update(output(*numbers, dtype=dtype), state, {**dict.fromkeys(TERMS, 1.0), **weights})
        return moved, jnp.stack([moved[0][name] for name in rule.names])

    return jax.lax.scan(step, (weights, state), (v, n, a))[1]


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_papers_equation_over_a_hundred_steps(name, rng):
    rule, oracle = CASES[name]
    v, n, a = numbers(rng)
    want = np.asarray(oracle(v, n, a), np.float64)
    np.testing.assert_allclose(run(rule, v, n, a), want, rtol=2e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(rule, v, n, a, jnp.float64), want, rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_its_state_has_one_structure_and_it_is_pure(name, rng):
    rule = ALL[name].bind(TERMS)
    v, n, a = (jax.tree.map(lambda x: x[0], part) for part in numbers(rng, 1))
    weights = {name: jnp.asarray(0.7) for name in TERMS}
    first, state = rule.init(weights)
    assert set(first) == set(rule.names)
    moved = rule.update(output(v, n, a), state, {**weights, **first})
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, (first, state))
    jitted = jax.jit(lambda rule, state, weights: rule.update(output(v, n, a), state, weights))
    chex.assert_trees_all_close(jitted(rule, state, {**weights, **first}), moved, rtol=1e-6)
    assert all(leaf.weak_type is False for leaf in jax.tree.leaves((first, state)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_weights_are_finite_and_not_negative_at_any_scale(name, scale, rng):
    v, n, a = numbers(rng, 8)
    for values, norms in ((v * scale, n), (v, n * scale), (v * scale, n * scale)):
        weights = np.asarray(run(ALL[name], values, norms, a))
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_does_not_stick(name, bad, rng):
    v, n, a = numbers(rng, 12)
    worse_v, worse_n = v.copy(), n.copy()
    worse_v[3], worse_n[5] = bad, bad
    weights = np.asarray(run(ALL[name], worse_v, worse_n, a))
    assert np.isfinite(weights).all()
    if name not in ("geco", "dual_ascent", "schedule", "every", "freeze"):
        assert not np.allclose(weights[6:], weights[5])  # it moves again


@pytest.mark.parametrize("name", [name for name, rule in ALL.items() if rule.needs])
def test_rules_of_norms_wait_for_fresh_ones(name, rng):
    rule = ALL[name].bind(TERMS)
    v, n, a = (jax.tree.map(lambda x: x[0], part) for part in numbers(rng, 1))
    weights, state = rule.init(dict.fromkeys(TERMS, jnp.ones(())))
    old = rule.update(output(v, n, a, age=jnp.int32(2)), state, {**dict.fromkeys(TERMS, 1.0), **weights})
    fresh = rule.update(output(v, n, a, age=jnp.int32(0)), state, {**dict.fromkeys(TERMS, 1.0), **weights})
    moving = {name for name in rule.names if name != "a"} if name == "chain" else set(rule.names)
    if name != "warmup":  # which counts steps all the while
        chex.assert_trees_all_equal({n: old[0][n] for n in moving}, {n: weights[n] for n in moving})
    assert any(float(fresh[0][n]) != float(weights[n]) for n in moving)


def test_without_norms_it_says_so(rng):
    rule = W.gradient_balance("a").bind(TERMS)
    v, n, a = (jax.tree.map(lambda x: x[0], part) for part in numbers(rng, 1))
    out = output(v, n, a)
    out = out.replace(base_loss=out.base_loss.replace(grad_norm=None))
    with pytest.raises(
        ValueError, match="GradientBalance of 'a': it reads the norms .*track_grad_norms=True"
    ):
        rule.update(out, rule.init({"a": 1.0})[1], {"a": jnp.ones(())})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: W.adaptive_kl("a", target=0), "AdaptiveKL of 'a': 0 < target, got 0"),
        (lambda: W.adaptive_kl("a", target=1, gain=2), "gain ≤ 1, got 2"),
        (lambda: W.gradient_share("a", share=-0.1), "0 ≤ share, got -0.1"),
        (lambda: W.gradient_balance("a", decay=1.5), "decay ≤ 1, got 1.5"),
        (lambda: W.dual_ascent("a", bound=float("nan")), "bound, got nan"),
        (lambda: W.geco("a", bound="1"), "bound is a number, got '1'"),
        (lambda: W.relobralo(temperature=0), "0 < temperature"),
        (lambda: W.gradient_balance("a", "a"), "named twice"),
        (lambda: W.dwa(3), "by their names"),
        (lambda: W.schedule("a", 0.1), "a function of the step"),
        (lambda: W.chain(), "at least one"),
        (lambda: W.chain("a"), "takes rules"),
        (lambda: W.ema("kl"), "takes a rule first"),
        (lambda: W.clip(W.dwa(), 2.0, 1.0), "2 ≤ high"),
        (lambda: W.warmup(W.dwa(), 2.5), "steps is a whole number of steps, got 2.5"),
        (lambda: W.every(W.dwa(), 0), "1 ≤ steps, got 0"),
        (lambda: W.freeze(W.dwa(), 1.5), "after is a whole number"),
        (
            lambda: W.custom("a", lambda w: w, None).bind(TERMS).init({"a": 1.0}),
            "init returns .weights by name, state., got dict",
        ),
        (
            lambda: W.custom("a", lambda w: ({**w, "b": 1.0}, {}), None).bind(TERMS).init({"a": 1.0}),
            r"init gives weights of \['a', 'b'\], and the rule names \['a'\]",
        ),
        (lambda: W.custom("a", None, None, needs=["values"]), "needs are"),
        (lambda: W.adaptive_kl("kl_rf", target=1).bind(("kl_ref", "l2")), "did you mean 'kl_ref'"),
        (lambda: W.dwa().bind(()), "no regularizer"),
        (
            lambda: W.chain(W.adaptive_kl("a", target=1), W.gradient_balance("a", "b")).bind(TERMS),
            "term 'a', rule AdaptiveKL of 'a' and rule GradientBalance of 'a', 'b'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        make()


def test_clip_does_not_wind_up(rng):
    rule = W.clip(W.adaptive_kl("a", target=1.0, gain=1.0), 0.5, 2.0)
    v = np.ones((30, 4))
    v[:20, 1], v[20:, 1] = 9.0, 0.1
    weights = np.asarray(run(rule, v, v, (v, v)))[:, 0]
    assert weights[19] == 2.0
    assert weights[20] == pytest.approx(1.6)  # at once


@pytest.mark.parametrize("name", ["gradient_share", "gradient_balance", "lr_annealing", "ntk"])
def test_averages_begin_at_the_weights_given_and_do_not_wind_up(name, rng):
    rule, _ = CASES[name]
    rule = dataclasses.replace(rule, names=("a",), decay=0.9)
    v, n, a = (np.ones((30, 4)), np.ones((30, 4)), (np.ones((30, 4)), np.ones((30, 4))))
    usual = np.asarray(run(rule, v, n, a))[:, 0]
    assert abs(usual[0] - 1) <= 0.1 * abs(usual[-1] - 1) + 0.1  # a tenth of the way
    v[:5, 1], n[:5, 1] = 1e-4, 1e-6  # as of a KL to the model itself
    a[1][:5, 1] = 1e-6
    weights = np.asarray(run(W.clip(rule, 0.0, 2.0), v, n, a))[:, 0]
    assert weights[4] == 2.0
    assert (
        abs(weights[14] - usual[-1]) < 0.8 * abs(2.0 - usual[-1]) + 1e-6
    )  # ten steps later it is on its way


def test_wrappers_do_what_they_say(rng):
    v, n, a = numbers(rng, 10)
    inner = np.asarray(run(W.gradient_balance(), v, n, a))
    total = np.asarray(run(W.normalize(W.gradient_balance(), 2.0), v, n, a))
    np.testing.assert_allclose(total, 2 * inner / inner.sum(1, keepdims=True), rtol=1e-5)
    ramp = np.asarray(run(W.warmup(W.gradient_balance(), 4), v, n, a))
    np.testing.assert_allclose(ramp, inner * np.minimum(np.arange(1, 11) / 4, 1)[:, None], rtol=1e-5)
    frozen = np.asarray(run(W.freeze(W.gradient_balance(), 3), v, n, a))
    np.testing.assert_allclose(frozen, np.r_[inner[:3], np.repeat(inner[2:3], 7, 0)], rtol=1e-6)
    third = np.asarray(run(W.every(W.dual_ascent("a", bound=0.0, rate=0.1), 3), v, n, a))[:, 0]
    np.testing.assert_allclose(third[2], 1 + 0.1 * v[2, 1], rtol=1e-6)
    assert third[0] == third[1] == 1.0
    assert third[2] == third[3] == third[4]
    last, smooth = np.ones(3), []
    for row in inner:
        last = 0.8 * last + 0.2 * row
        smooth.append(last)
    np.testing.assert_allclose(run(W.ema(W.gradient_balance(), 0.8), v, n, a), smooth, rtol=1e-5)


def test_ntk_trace_is_the_kernels():
    residual = lambda w, x: jnp.sin(jnp.dot(w, x))
    w, points = jnp.array([0.3, -0.7]), jnp.array([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]])
    jacobian = jax.jacobian(lambda w: jax.vmap(residual, (None, 0))(w, points))(w)
    np.testing.assert_allclose(W.ntk_trace(residual, w, points), np.trace(jacobian @ jacobian.T), rtol=1e-6)


def test_now_and_then_meets_norms_now_and_then(rng):
    rule = W.every(W.gradient_balance("a", decay=0.0), 4).bind(TERMS)
    v, n, a = numbers(rng, 30)
    weights, state = rule.init(dict.fromkeys(TERMS, jnp.ones(())))
    moved = []
    for t in range(30):
        row = jax.tree.map(lambda x, t=t: x[t], (v, n, a))
        after, state = rule.update(output(*row, age=jnp.int32(t % 4)), state, weights)
        moved += [t] if float(after["a"]) != float(weights["a"]) else []
        weights = after
    assert moved == [4, 8, 12, 16, 20, 24, 28]


def test_an_average_waits_for_fresh_norms(rng):
    rule = W.ema(W.gradient_balance("a"), 0.5).bind(TERMS)
    v, n, a = numbers(rng, 6)
    weights, state = rule.init(dict.fromkeys(TERMS, jnp.ones(())))
    found = []
    for t in range(6):
        row = jax.tree.map(lambda x, t=t: x[t], (v, n, a))
        weights, state = rule.update(output(*row, age=jnp.int32(t % 3)), state, weights)
        found.append(float(weights["a"]))
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]


@pytest.mark.parametrize("name", ["adaptive_kl", "geco", "dual_ascent", "clip"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_moves_nothing(name, bad, rng):
    v, n, a = numbers(rng, 4)
    v[2, 1] = bad
    weights = np.asarray(run(ALL[name], v, n, a))[:, 0]
    assert weights[2] == weights[1] != weights[3]


def test_ratios_of_what_is_too_small_for_float32(rng):
    v = np.ones((4, 4))
    v[1:] = [1.0, 300.0, 200.0, 1.0]
    assert np.isfinite(run(W.dwa(temperature=1.0), v, v, (v, v))).all()
    tiny = {n: jnp.exp(jnp.float32(k)) for k, n in enumerate(TERMS)}
    rule = W.dwa("a", temperature=1.0).bind(TERMS)
    state = {"last": jnp.array([1.0, 1.0]), "count": jnp.int32(1)}
    moved, _ = rule.update(output([-200.0, -201.0, 1.0, 1.0], v[0], (v[0], v[0])), state, tiny)
    np.testing.assert_allclose(moved["a"], np.exp(-1), rtol=1e-5)


def test_a_term_without_a_gradient_in_the_space_is_named(rng):
    objective = jr.compose(
        lambda out, batch: jnp.sum(out**2),
        [dict(name="decay", fn=jr.regularizers.WeightL2(), weight=0.1)],
        forward=lambda params, batch: params["w"] * 2,
        track_grad_norms=jr.GradNorms(wrt="outputs"),
        weighting=W.gradient_balance(),
    )
    with pytest.raises(ValueError, match=r"term 'decay' is on params .*GradNorms\(wrt='params'\)"):
        objective.value_and_grad({"w": jnp.ones(2)}, state=objective.init())
