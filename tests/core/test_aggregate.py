"""What an aggregator makes of a Gramian, and where its coefficients go: against the sum written by hand."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gramian import a, base, composed, model, problem, rows

import jaxreg as jr


class Answer(NamedTuple):
    coefficients: jax.Array
    metrics: dict
    state: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tilt:
    """Coefficients that depend on the Gramian and on a number."""

    power: float = 1.0
    wrt: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    nonfinite: str = dataclasses.field(default="propagate", metadata=dict(static=True))

    def __call__(self, gramian):
        return self.solve(gramian).coefficients

    def solve(self, gramian, *, key=None, state=None):
        trace = jnp.trace(gramian)
        coefficients = 1 + self.power * gramian[0] / jnp.where(trace == 0, 1, trace)
        return Answer(coefficients, {"trace": trace}, None)


@dataclasses.dataclass(frozen=True)
class Counted:
    """Carries a count, and doubles every second step."""

    wrt: str | None = None
    stateful = True

    def init(self, count):
        return {"steps": jnp.zeros((), jnp.int32), "rows": jnp.zeros(count)}

    def __call__(self, gramian):
        return jnp.ones(len(gramian))

    def solve(self, gramian, *, key=None, state=None):
        odd = state["steps"] % 2
        following = {"steps": state["steps"] + 1, "rows": state["rows"] + jnp.diagonal(gramian)}
        return Answer(jnp.full(len(gramian), 1.0 + odd), {}, following)


@dataclasses.dataclass(frozen=True)
class Drawn:
    needs_key = True

    def __call__(self, gramian):
        raise AssertionError

    def solve(self, gramian, *, key=None, state=None):
        return Answer(jax.random.uniform(key, (len(gramian),)), {}, None)


def tilted(vectors, power=1.0):
    gram = vectors @ vectors.T
    return 1 + power * gram[0] / np.trace(gram)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "norms", [False, True, jr.GradNorms(wrt="outputs", gramian=True), jr.GradNorms(chunk_size=2)]
)
def test_in_output_space_one_pullback_of_the_combination(rng, norms):
    params, batch = problem(rng)
    objective = composed(norms, on_params=True, aggregator=Tilt())
    (loss, out), grads = objective.value_and_grad(params, batch)
    coefficients = tilted(rows(objective, params, batch, "outputs"))
    names = ("base_loss", "a", "b", "c")
    assert tuple(out.aggregation.coefficients) == names
    np.testing.assert_allclose(list(out.aggregation.coefficients.values()), coefficients, rtol=1e-5)
    vectors = rows(objective, params, batch, "params")  # base_loss, a, decay, b, c
    want = np.r_[coefficients[:2], 1, coefficients[2:]] @ vectors
    np.testing.assert_allclose(flat(grads), want, rtol=1e-4, atol=1e-5)
    plain, _ = composed(False, on_params=True)(params, batch)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)  # the total stays the plain sum
    assert out.gramian.shape == (4, 4)
    assert float(out.aggregation.metrics["trace"]) == pytest.approx(float(jnp.trace(out.gramian)), rel=1e-5)
    assert (out.total_grad_norm is None) == (norms is False)


@pytest.mark.parametrize(
    "norms", [False, True, jr.GradNorms(gramian=True, chunk_size=2), jr.GradNorms(every=2)]
)
def test_in_params_space_all_terms_are_combined(rng, norms):
    params, batch = problem(rng)
    objective = composed(norms, on_params=True, aggregator=Tilt(wrt="params"))
    state = objective.init()
    (_, out), grads = objective.value_and_grad(params, batch, state=state)
    vectors = rows(objective, params, batch, "params")
    coefficients = tilted(vectors)
    assert tuple(out.aggregation.coefficients) == ("base_loss", *objective.names)
    np.testing.assert_allclose(list(out.aggregation.coefficients.values()), coefficients, rtol=1e-4)
    np.testing.assert_allclose(flat(grads), coefficients @ vectors, rtol=1e-4, atol=1e-5)
    if norms is not False:
        np.testing.assert_allclose(out.total_grad_norm, np.linalg.norm(coefficients @ vectors), rtol=1e-5)


def test_measured_now_and_then_the_coefficients_stay_in_between(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(every=2), on_params=True, aggregator=Tilt(wrt="params"))
    (_, out), _ = objective.value_and_grad(params, batch, state=objective.init())
    first = out.aggregation
    moved = jax.tree.map(lambda p: p + 0.3, params)
    (_, out), grads = objective.value_and_grad(moved, batch, state=out.state)
    chex.assert_trees_all_equal(out.aggregation, first)
    want = np.asarray(list(first.coefficients.values())) @ rows(objective, moved, batch, "params")
    np.testing.assert_allclose(flat(grads), want, rtol=1e-4, atol=1e-5)
    (_, out), _ = objective.value_and_grad(moved, batch, state=out.state)
    assert float(out.aggregation.coefficients["a"]) != float(first.coefficients["a"])


def test_norms_of_the_params_now_and_then_beside_an_aggregator_of_every_step(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(wrt="params", every=3), on_params=True, aggregator=Tilt())
    always = composed(False, on_params=True, aggregator=Tilt())
    state, ages = objective.init(), []
    for _ in range(4):
        (_, out), grads = objective.value_and_grad(params, batch, state=state)
        _, want = always.value_and_grad(params, batch)
        chex.assert_trees_all_close(grads, want, rtol=1e-4, atol=1e-6)
        params, state = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), out.state
        ages.append(int(out.norms_age))
    assert ages == [0, 1, 2, 0]


def test_a_plain_function_will_do(rng):
    params, batch = problem(rng)
    objective = composed(False, aggregator=lambda gramian: jnp.ones(len(gramian)))
    (_, out), grads = objective.value_and_grad(params, batch)
    _, plain = composed(False).value_and_grad(params, batch)
    chex.assert_trees_all_close(grads, plain, rtol=1e-5, atol=1e-6)
    assert out.aggregation.metrics == {}


def test_changing_a_number_compiles_nothing(rng):
    params, batch = problem(rng)
    counted = chex.assert_max_traces(lambda out, batch: a(out, batch), n=1)

    def build(power):
        return jr.compose(
            base, [dict(name="a", fn=counted, weight=1.0)], forward=model, aggregator=Tilt(power)
        )

    for power in (1.0, 2.0, np.float32(3), jnp.asarray(0.5)):
        build(power).value_and_grad(params, batch)


@pytest.mark.parametrize("norms", [False, True])
def test_it_is_not_differentiated_behind_ones_back(rng, norms):
    params, batch = problem(rng)
    objective = composed(norms, aggregator=Tilt())
    loss, _ = objective(params, batch)
    assert jnp.isfinite(loss)
    for differentiated in (
        jax.grad(lambda p: objective(p, batch)[0]),
        jax.grad(lambda p: jax.jit(objective)(p, batch)[0]),
        lambda p: jax.value_and_grad(objective, has_aux=True)(p, batch),
        jax.grad(lambda p: jax.checkpoint(lambda p: objective(p, batch)[0])(p)),
        jax.jit(jax.grad(lambda p: 2 * objective(p, batch)[0])),
        jax.grad(lambda p: objective.value_and_grad(p, batch)[0][0]),
        lambda p: jax.jvp(lambda p: objective(p, batch)[0], (p,), (p,)),
    ):
        with pytest.raises(TypeError, match="objective.value_and_grad"):
            differentiated(params)


def test_a_stateful_one_carries_its_state(rng):
    params, batch = problem(rng)
    for aggregator in (Counted(), Counted(wrt="params")):
        objective = composed(False, aggregator=aggregator)
        state, taken = objective.init(), []
        for _ in range(3):
            (_, out), _ = objective.value_and_grad(params, batch, state=state)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, out.state)
            state = out.state
            taken.append(float(out.aggregation.coefficients["a"]))
        assert taken == [1, 2, 1]
        with pytest.raises(ValueError, match="it carries a state: pass state=objective.init()"):
            objective.value_and_grad(params, batch)


def test_a_random_one_gets_its_own_key(rng):
    params, batch = problem(rng)
    objective = composed(False, aggregator=Drawn())
    with pytest.raises(ValueError, match="aggregator Drawn.*random key"):
        objective.value_and_grad(params, batch)
    one, again, other = (
        objective.value_and_grad(params, batch, key=jax.random.key(k))[0][1].aggregation.coefficients["a"]
        for k in (0, 0, 1)
    )
    assert float(one) == float(again) != float(other)


@pytest.mark.parametrize("wrt", ["outputs", "params"])
def test_nan_goes_where_it_is_said_to(rng, wrt):
    params, batch = problem(rng)
    bad = dict(name="bad", fn=lambda out, batch: jnp.sqrt(jnp.sum(out["y"] * 0)), weight=1.0)
    build = lambda **how: jr.compose(base, [bad], forward=model, aggregator=Tilt(wrt=wrt, **how))
    (_, out), grads = build().value_and_grad(params, batch)
    assert np.isnan(flat(grads)).all()
    with pytest.raises(FloatingPointError, match="the gradients of 'bad' are not finite; nonfinite='drop'"):
        build(nonfinite="raise").value_and_grad(params, batch)
    jax.jit(build(nonfinite="raise").value_and_grad)(params, batch)  # a traced step cannot raise


def test_weight_0_and_a_lone_base_loss(rng):
    params, batch = problem(rng)
    objective = composed(False, aggregator=Tilt()).without("a", "c")
    _, grads = objective.value_and_grad(params, batch)
    vectors = rows(objective, params, batch, "params")
    np.testing.assert_allclose(flat(grads), 2 * vectors[0], rtol=1e-4, atol=1e-6)
    alone = jr.compose(base, forward=model, aggregator=Tilt())
    (_, out), grads = alone.value_and_grad(params, batch)
    np.testing.assert_allclose(flat(grads), 2 * vectors[0], rtol=1e-4, atol=1e-6)
    assert list(out.aggregation.coefficients) == ["base_loss"]


def test_vmap_over_weights_and_scan(rng):
    params, batch = problem(rng)
    objective = composed(jr.GradNorms(wrt="outputs"), aggregator=Tilt())
    weights = jnp.asarray([0.0, 0.5, 2.0])
    (_, out), _ = jax.vmap(lambda w: objective.with_weights({"a": w}).value_and_grad(params, batch))(weights)
    (_, one), _ = objective.with_weights({"a": 0.5}).value_and_grad(params, batch)
    np.testing.assert_allclose(
        out.aggregation.coefficients["a"][1], one.aggregation.coefficients["a"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("aggregator", "rest", "message"),
    [
        (Tilt, {}, r"write aggregator=Tilt\(\)"),
        ("upgrad", {}, "a function from a Gramian .* got str"),
        (Tilt(wrt="rows"), {}, "wrt is 'outputs', 'params' or None"),
        (Tilt(wrt="params"), dict(forward=None), "needs to know the model"),
        (Tilt(wrt="params"), dict(track_grad_norms=jr.GradNorms(wrt="outputs")), "one space for both"),
        (
            Tilt(wrt="params"),
            dict(track_grad_norms=jr.GradNorms(params="v")),
            "leave params= out, or combine",
        ),
    ],
)
def test_what_does_not_fit_is_refused(aggregator, rest, message):
    arguments = dict(forward=model) | rest
    with pytest.raises((TypeError, ValueError), match=message):
        jr.compose(base, aggregator=aggregator, **arguments)


def test_coefficients_of_another_shape_are_refused(rng):
    params, batch = problem(rng)
    with pytest.raises(ValueError, match=r"coefficients \[4\], got shape \(\)"):
        composed(False, aggregator=lambda gramian: gramian[0, 0]).value_and_grad(params, batch)


def test_the_objective_says_what_is_combined():
    text = repr(composed(False, on_params=True, aggregator=Tilt()))
    assert "of the outputs' gradients; those of decay, on params, are added" in text
    assert "of the params' gradients of all terms" in repr(composed(False, aggregator=Tilt(wrt="params")))
