"""Rules in an objective: the weight that a rule chose is the weight of the next step, and it keeps its
promise.

"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr

W = jr.weighting


def quadratic(at, scale=1.0):
    return lambda x, batch: scale * jnp.mean(jnp.square(x - jnp.asarray(at)))


BASE = quadratic([1.0, -2.0, 0.5])


def composed(rule, terms, norms=False, **rest):
    specs = [dict(name=name, fn=fn, weight=weight) for name, (fn, weight) in terms.items()]
    return jr.compose(BASE, specs, weighting=rule, track_grad_norms=norms, **rest)


def trained(objective, steps=600, rate=0.05):
    def step(carry, _):
        x, state = carry
        (_, out), grad = objective.value_and_grad(x, state=state)
        return (x - rate * grad, out.state), out

    _, outs = jax.lax.scan(step, (jnp.zeros(3), objective.init()), None, steps)
    return outs


TERMS = {"kl": (quadratic([0.0, 0.0, 0.0]), 1.0), "far": (quadratic([3.0, 3.0, 3.0], 50.0), 0.01)}


def test_a_kl_settles_at_its_target():
    outs = trained(composed(W.adaptive_kl("kl", target=0.5), TERMS), 3000)
    assert np.allclose(outs.regularizers["kl"].value[-200:], 0.5, rtol=0.1)


@pytest.mark.parametrize("every", [1, 5])
def test_a_share_is_kept(every):
    rule = W.gradient_share("far", share=0.25)
    outs = trained(composed(rule, TERMS, jr.GradNorms(every=every)))
    share = outs.regularizers["far"].grad_norm_weighted / outs.base_loss.grad_norm
    measured = np.asarray(share)[::every][-20:]
    assert np.allclose(measured, 0.25, rtol=0.05)


def test_a_bound_holds():
    for rule in (W.dual_ascent("kl", bound=0.4, rate=0.2), W.geco("kl", bound=0.4, rate=0.2, decay=0.9)):
        outs = trained(composed(rule, TERMS), 4000)
        assert np.asarray(outs.regularizers["kl"].value[-200:]).max() <= 0.4 * 1.02


def test_balanced_gradients_are_equally_long():
    outs = trained(composed(W.gradient_balance(decay=0.5), TERMS, True), 400, 0.02)
    norms = [np.asarray(term.grad_norm_weighted[-1]) for term in outs.regularizers.values()]
    np.testing.assert_allclose(norms, outs.base_loss.grad_norm[-1], rtol=0.05)


def test_the_weight_a_rule_chose_is_the_weight_in_the_output():
    objective = composed(W.adaptive_kl("kl", target=0.5), TERMS)
    state, x = objective.init(), jnp.zeros(3)
    assert float(objective.weights(state)["kl"]) == 1.0
    for _ in range(3):
        (loss, out), grad = objective.value_and_grad(x, state=state)
        term = out.regularizers["kl"]
        assert float(term.weight) == float(state["weights"]["kl"])
        np.testing.assert_allclose(term.contribution, term.weight * term.value, rtol=1e-6)
        by_hand = composed(None, TERMS).with_weights({"kl": float(term.weight)})
        chex.assert_trees_all_close(grad, by_hand.value_and_grad(x)[1], rtol=1e-6)
        state, x = out.state, x - 0.1 * grad


def test_it_touches_only_the_terms_that_it_names():
    outs = trained(composed(W.adaptive_kl("kl", target=0.5), TERMS), 5)
    assert np.unique(outs.regularizers["far"].weight).tolist() == [np.float32(0.01)]


def test_a_weight_that_was_set_is_kept_from_the_rule():
    objective = composed(W.adaptive_kl("kl", target=0.5), TERMS)
    held = objective.without("kl")
    (_, out), _ = held.value_and_grad(jnp.zeros(3), state=objective.init())
    assert float(out.regularizers["kl"].weight) == 0
    assert float(out.state["weights"]["kl"]) > 0  # what the rule chose goes on beside it
    assert "kl: 1, moved" in repr(objective)
    assert "kl: 0 ·" in repr(held)
    assert "AdaptiveKL('kl', target=0.5" in repr(objective)


def test_changing_a_number_compiles_nothing():
    counted = chex.assert_max_traces(BASE, n=1)
    terms = [dict(name="kl", fn=quadratic([0.0, 0.0, 0.0]), weight=1.0)]
    for target in (0.1, 0.2, np.float32(0.3)):
        objective = jr.compose(counted, terms, weighting=W.adaptive_kl("kl", target=target))
        terms = [dict(name="kl", fn=terms[0]["fn"], weight=2.0)]
        objective.value_and_grad(jnp.zeros(3), state=objective.init())


def test_settings_of_a_rule_train_side_by_side():
    settings = [composed(W.adaptive_kl("kl", target=t), TERMS) for t in (0.3, 0.6)]
    many = jr.stack(settings)
    outs = jax.vmap(lambda o: trained(o, 50))(many)
    for k, one in enumerate(settings):
        np.testing.assert_allclose(outs.loss_total[k], trained(one, 50).loss_total, rtol=1e-4)


def test_without_a_gradient_rules_of_norms_wait():
    objective = composed(W.gradient_share("kl", share=0.5), TERMS, True)
    state = objective.init()
    _, out = objective(jnp.zeros(3), state=state)
    chex.assert_trees_all_equal(out.state["weights"], state["weights"])
    chex.assert_trees_all_equal(out.state["rules"], state["rules"])


def test_beside_an_aggregator_and_host_terms():
    judge = jr.host.HostRegularizer("judge", lambda data: 2.0, weight=1.0)
    rule = W.chain(W.dual_ascent("judge", bound=1.0, rate=0.5), W.gradient_share("kl", share=0.5))
    objective = jr.compose(
        lambda x, batch: -batch.mean(x),
        [judge, dict(name="kl", fn=lambda x, batch: batch.mean(jnp.square(x)), weight=0.1)],
        weighting=rule,
        track_grad_norms=True,
        aggregator=jr.aggregation.UPGrad(),
    )
    batch = jr.TokenBatch.from_arrays(ref=jnp.zeros((2, 8)))
    (_, out), _ = objective.value_and_grad(jnp.full((2, 8), -1.0), batch, state=objective.init())
    assert float(out.state["weights"]["judge"]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("rule", "rest", "message"),
    [
        (W.adaptive_kl, {}, "weighting is a rule of jaxreg.weighting"),
        (0.5, {}, "weighting is a rule"),
        (W.gradient_balance(), {}, "GradientBalance.*reads the norms .*track_grad_norms=True"),
        (W.lr_annealing(), dict(norms=True), r"GradNorms\(absolutes=True\)"),
        (W.adaptive_kl("kll", target=1.0), {}, "did you mean 'kl'"),
    ],
)
def test_what_does_not_fit_is_refused(rule, rest, message):
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        composed(rule, TERMS, **rest)


def test_a_schedule_and_a_rule_on_one_term_are_refused():
    terms = {"kl": (BASE, optax.linear_schedule(0.0, 1.0, 10))}
    with pytest.raises(ValueError, match="its weight is a schedule, and the rule AdaptiveKL"):
        composed(W.adaptive_kl("kl", target=1.0), terms)


def test_without_its_state_it_says_so():
    with pytest.raises(ValueError, match="term 'kl': a rule moves its weight.*state=objective.init()"):
        composed(W.adaptive_kl("kl", target=1.0), TERMS).value_and_grad(jnp.zeros(3))
