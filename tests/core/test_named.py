"""`out.regularizers` is a dict that knows its names: for JAX, for pickle and for Flax like any other."""

import collections
import copy
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxreg as jr


def total(x, batch):
    return jnp.sum(x), {"max": jnp.max(x)}


def made(names=("zeta", "alpha")):
    terms = [dict(name=name, fn=total, weight=optax.constant_schedule(0.5)) for name in names]
    objective = jr.compose(total, terms, track_grad_norms=True)
    return objective, objective.value_and_grad(jnp.ones(3), state=objective.init())[0][1]


def test_a_wrong_name_is_told_the_nearest():
    _, out = made()
    with pytest.raises(KeyError, match=r"no term is named 'zta'; did you mean 'zeta'\? the terms are"):
        out.regularizers["zta"]
    assert out.regularizers.get("zta") is None
    assert "zta" not in out.regularizers
    assert isinstance(out.regularizers, collections.OrderedDict)


def test_it_is_a_pytree_in_the_objectives_order():
    _, out = made()
    doubled = jax.tree.map(lambda a: 2 * a, out)
    assert list(doubled.regularizers) == ["zeta", "alpha"]
    assert float(doubled.regularizers["zeta"].value) == 6
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(out)]
    assert ".regularizers['zeta'].value" in paths
    assert jax.tree.structure(out) == jax.tree.structure(doubled)
    stacked = jax.lax.scan(lambda carry, _: (carry, out), 0, length=2)[1]
    assert stacked.regularizers["alpha"].value.shape == (2,)


@pytest.mark.parametrize("through", [lambda out: pickle.loads(pickle.dumps(out)), copy.copy, copy.deepcopy])
def test_it_is_copied_and_pickled(through):
    _, out = made()
    again = through(out)
    assert type(again.regularizers) is type(out.regularizers)
    assert again.to_dict() == out.to_dict()


def test_flax_writes_and_reads_outputs_states_batches_and_objectives():
    objective, out = made()
    batch = jr.TokenBatch.pack_pairs([{"ref": [-1.0]}], [{"ref": [-2.0, -3.0]}])
    for whole in (out, out.on_host(), out.state, batch, objective):
        empty = jax.tree.map(lambda leaf: jnp.zeros_like(leaf), whole)
        again = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(whole))
        chex.assert_trees_all_equal(again, whole)
    assert again.weights(objective.init())["zeta"] == 0.5


def test_flax_refuses_the_output_of_another_objective():
    _, out = made()
    _, other = made(("zeta", "beta"))
    with pytest.raises(
        ValueError, match=r"of the terms \['zeta', 'alpha'\], but this one has \['zeta', 'beta'\]"
    ):
        flax.serialization.from_bytes(other, flax.serialization.to_bytes(out))
