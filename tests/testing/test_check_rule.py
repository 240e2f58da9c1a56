"""check_rule and check_aggregator: what is built in passes, and what is broken is caught and named."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxreg as jr
from jaxreg import aggregation, testing, weighting

RULES = [
    weighting.adaptive_kl("a", target=0.8),
    weighting.dual_ascent("a", bound=1.0),
    weighting.geco("a", bound=1.0),
    weighting.gradient_share("b"),
    weighting.gradient_balance(),
    weighting.lr_annealing(),
    weighting.gradnorm(),
    weighting.softadapt(),
    weighting.relobralo(),
    weighting.dwa("a"),
    weighting.famo(),
    weighting.uncertainty(optimizer=optax.adam(1e-2)),
    weighting.schedule("a", optax.linear_schedule(0.0, 1.0, 5)),
    weighting.clip(weighting.ema(weighting.gradient_balance("a", "b")), 0.1, 3.0),
    weighting.chain(weighting.adaptive_kl("a", target=1.0), weighting.gradient_share("c")),
]
AGGREGATORS = [
    aggregation.UPGrad(),
    aggregation.DualProj(),
    aggregation.MGDA(),
    aggregation.CAGrad(),
    aggregation.IMTLG(),
    aggregation.ConFIG(),
    aggregation.AlignedMTL(),
    aggregation.PCGrad(),
    aggregation.GradVac(),
    aggregation.FairGrad(),
    aggregation.NashMTL(),
    aggregation.PCD(),
    aggregation.Mean(),
    aggregation.Sum(),
    aggregation.Random(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_built_in_rules_pass(rule):
    testing.check_rule(rule)


def test_a_rule_of_metrics_passes_with_them():
    testing.check_rule(weighting.ntk(), metrics=["ntk_trace"])
    with pytest.raises(testing.RuleCheckError, match="reports no metric 'ntk_trace'"):
        testing.check_rule(weighting.ntk())


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda aggregator: type(aggregator).__name__)
def test_built_in_aggregators_pass(aggregator):
    testing.check_aggregator(aggregator)


def broken(update, needs=(), init=lambda w: (w, {"n": jnp.zeros(())})):
    return weighting.custom("a", init, update, needs)


class Stateless(jr.weighting.Rule):
    """Overrides update, and forgets to wait, or to keep what is finite."""

    needs = frozenset({"norms"})

    def update(self, out, state, weights):
        return {name: out.base_loss.grad_norm / weights[name] for name in self.names}, state


class Remembers(jr.weighting.Rule):
    """Its state takes over any norm, and its weights come of the state."""

    needs = frozenset({"norms"})

    def init(self, weights):
        return super().init(weights)[0], {"sum": jnp.zeros(())}

    def update(self, out, state, weights):
        return dict.fromkeys(self.names, state["sum"]), {"sum": state["sum"] + out.base_loss.grad_norm}


class Steps(jr.weighting.Rule):
    """Counts its steps in a tuple's length."""

    def init(self, weights):
        return super().init(weights)[0], ()

    def update(self, out, state, weights):
        return {name: weights[name] for name in self.names}, (*state, jnp.zeros(()))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (broken(lambda out, s, w: (w, {"m": s["n"]})), "a state of one structure|it raises"),
        (broken(lambda out, s, w: ({"a": w["a"] * (1 if jnp.ones(()) else 2)}, [])), "state"),
        (
            broken(lambda out, s, w: ({"a": out.base_loss.grad_norm}, s)),
            "reads only what it needs: it raises",
        ),
        (
            broken(lambda out, s, w: ({"a": out.base_loss.grad_abs_max}, s), needs=["norms"]),
            "reads only what it needs: it raises",
        ),
        (broken(lambda out, s, w: ({}, s)), r"update gives weights of \[\], and the rule names \['a'\]"),
        (Stateless(("a",)), r"weights of \['a'\] go by norms that are a step old"),
        (Stateless(("a",)), "where the gradient of the base loss is 0|NaN and ∞ do not stick"),
        (Remembers(("a",)), "its state takes over norms that are a step old"),
        (Remembers(("a",)), "NaN and ∞ do not stick"),
        (Steps(("a",)), "it compiles once: three steps traced it 3 times"),
        (Steps(("a",)), "a state of one structure"),
    ],
)
def test_broken_rules_are_caught(rule, message):
    with pytest.raises(testing.RuleCheckError, match=message):
        testing.check_rule(rule)


class Claims:
    non_conflicting = True

    def __call__(self, gramian):
        return jnp.ones(len(gramian))


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (lambda gramian: gramian.sum(), r"coefficients \[K\]: of a Gramian \[4, 4\] it makes shape \[\]"),
        (lambda gramian: 1 / jnp.diagonal(gramian), "finite coefficients: in 20 of 60"),
        (lambda gramian: jnp.arange(1.0, 1 + len(gramian)), "whatever the order"),
        (
            lambda gramian: jnp.ones(len(gramian)) * jnp.trace(gramian),
            "linear in the gradients' scale: at 1e-15",
        ),
        (Claims(), "conflicts with no gradient: it conflicts with a gradient, cosine -"),
        (
            lambda gramian: jnp.where(jax.random.uniform(jax.random.key(0)) > 2, 1, jnp.nan) + gramian[0],
            "not",
        ),
        (lambda gramian: gramian @ jnp.ones(3), "it raises"),
    ],
)
def test_broken_aggregators_are_caught(aggregator, message):
    with pytest.raises(testing.AggregatorCheckError, match=message):
        testing.check_aggregator(aggregator)
