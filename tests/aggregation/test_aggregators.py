"""What all aggregators have in common, beside what `check_aggregator` checks of them."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg import aggregation, weighting

KINDS = [
    aggregation.UPGrad,
    aggregation.DualProj,
    aggregation.MGDA,
    aggregation.CAGrad,
    aggregation.IMTLG,
    aggregation.ConFIG,
    aggregation.AlignedMTL,
    aggregation.PCGrad,
    aggregation.GradVac,
    aggregation.FairGrad,
    aggregation.NashMTL,
    aggregation.PCD,
    aggregation.Mean,
    aggregation.Sum,
    aggregation.Random,
]


def test_no_two_kinds_have_one_structure():
    terms = [
        jr.regularizers.WeightL1(),
        jr.regularizers.WeightL2(),
        jr.regularizers.LabelSmoothing(),
        jr.regularizers.ZLoss(),
        jr.regularizers.ConfidencePenalty(),
        jr.of("a", jr.regularizers.ZLoss()),
    ]
    rules = [weighting.softadapt(), weighting.dwa(), weighting.adaptive_kl("a", target=1.0)]
    structures = [jax.tree.structure(made) for made in [*(kind() for kind in KINDS), *rules, *terms]]
    for one, other in itertools.combinations(structures, 2):
        assert one != other


def test_jit_takes_none_for_another():
    run = jax.jit(lambda aggregator, gramian: aggregator(gramian))
    for size in range(1, 12):
        gramian = jnp.eye(size)
        np.testing.assert_allclose(run(aggregation.Mean(), gramian), 1 / size, rtol=1e-6)
        np.testing.assert_allclose(run(aggregation.Sum(), gramian), 1.0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_numbers_are_leaves_and_choices_are_not(kind):
    aggregator = kind(wrt="params")
    leaves, structure = jax.tree.flatten(aggregator)
    assert all(isinstance(leaf, float) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves) == aggregator
    assert structure != jax.tree.structure(kind())
    counted = chex.assert_max_traces(lambda made, g: made.solve(g, key=jax.random.key(0)).coefficients, n=1)
    run, gramian = jax.jit(counted), jnp.eye(3)
    run(aggregator, gramian)
    run(jax.tree.map(lambda leaf: leaf * 0.5, aggregator), gramian)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nan_goes_where_it_is_said_to(kind):
    gramian = jnp.eye(3).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    key = jax.random.key(0)
    assert np.isnan(kind()(gramian, key=key)).all()
    assert kind(nonfinite="drop")(gramian, key=key).tolist() == [1, 0, 1]
    with pytest.raises(FloatingPointError, match=r"rows \[1\] of the Gramian"):
        kind(nonfinite="raise")(gramian, key=key)
    state = kind().init(3)
    chex.assert_trees_all_equal(kind().solve(gramian, key=key, state=state).state, state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregation.UPGrad(wrt="rows"), "UPGrad: wrt is None or 'outputs' or 'params', got 'rows'"),
        (lambda: aggregation.Sum(nonfinite="ignore"), "nonfinite is 'propagate' or 'drop' or 'raise'"),
        (lambda: aggregation.UPGrad(reg_eps=0.0), "1e-07 ≤ reg_eps"),
        (lambda: aggregation.CAGrad(c="0.4"), "c is a number"),
        (lambda: aggregation.FairGrad(alpha=-1.0), "0 ≤ alpha"),
        (lambda: aggregation.AlignedMTL(scale_mode="max"), "scale_mode is 'min' or"),
        (lambda: aggregation.PCD(tau=2.0), "tau ≤ 1, got 2"),
        (lambda: aggregation.UPGrad()(jnp.ones(3)), r"a Gramian is \[K, K\], got shape \(3,\)"),
        (lambda: aggregation.UPGrad()(jnp.eye(3, dtype=int)), "real floating-point numbers, got int32"),
        (lambda: aggregation.PCGrad()(jnp.eye(3)), r"pass key=jax.random.key\(seed\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
