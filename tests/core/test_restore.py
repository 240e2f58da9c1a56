"""A state goes through orbax and flax and comes back bit for bit, and knows what changed since."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr

X = jnp.array([1.0, -2.0, 3.0])


class Noise:
    """A stateful term with a typed key."""

    def init(self):
        return {"key": jax.random.key(3), "count": jnp.zeros((), jnp.int32)}

    def __call__(self, x, batch, *, state):
        key, own = jax.random.split(state["key"])
        return jnp.sum(x) * jax.random.normal(own), {}, {"key": key, "count": state["count"] + 1}


def scaled(decay=0.9):
    return jr.memory.RunningScale(term=lambda x, batch: jnp.sum(x**2), decay=decay)


def objective_of(*names, **more):
    terms = {
        "scaled": dict(name="scaled", fn=scaled(), weight=0.1),
        "noise": dict(name="noise", fn=Noise(), weight=0.2),
        "faded": dict(
            name="faded", fn=lambda x, batch: jnp.sum(x), weight=optax.linear_schedule(1.0, 0.0, 9)
        ),
        "ruled": dict(name="ruled", fn=lambda x, batch: jnp.mean(x**2), weight=0.3),
    }
    rule = jr.weighting.gradient_share("ruled", share=0.2) if "ruled" in names else None
    return jr.compose(
        lambda x, batch: jnp.sum(jnp.abs(x)),
        [terms[name] for name in names],
        track_grad_norms=jr.GradNorms(every=2),
        weighting=rule,
        **more,
    )


def state_of(objective, steps=3):
    state = objective.init()
    for _ in range(steps):
        (_, out), _ = objective.value_and_grad(X, state=state)
        state = out.state
    return state


def raw(state):
    """Typed keys as their data, which NumPy can compare."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        state,
    )


def test_orbax_gives_it_back_bit_for_bit(tmp_path):
    import orbax.checkpoint as ocp

    objective = objective_of("scaled", "noise", "faded", "ruled")
    state = state_of(objective)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(objective.init))
    chex.assert_trees_all_equal(raw(objective.restored(back)), raw(state))
    chex.assert_trees_all_equal(
        objective.value_and_grad(X, state=objective.restored(back))[1],
        objective.value_and_grad(X, state=state)[1],
    )


def test_flax_bytes_give_it_back_bit_for_bit():
    objective = objective_of("scaled", "faded", "ruled")
    state = state_of(objective)
    data = flax.serialization.to_bytes(state)
    chex.assert_trees_all_equal(objective.restored(flax.serialization.msgpack_restore(data)), state)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(objective.init(), data), state)


def test_its_structure_is_that_of_step_0():
    objective = objective_of("scaled", "noise", "faded", "ruled")
    abstract = jax.eval_shape(objective.init)
    assert {*abstract} == {"version", "step", "terms", "weights", "rules", "norms", "norms_age"}
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state_of(objective))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(jax.eval_shape(lambda: raw(objective.init()))))


def test_a_term_that_was_added_begins_anew_and_one_that_is_gone_is_named():
    saved = state_of(objective_of("scaled", "faded"))
    with pytest.warns(
        jr.StateChangedWarning, match="term 'noise' is new and begins with its first state"
    ) as told:
        state = objective_of("scaled", "faded", "noise").restored(saved)
    assert "what norms were measured last begins anew, for it has float32[3]" in str(told[0].message)
    chex.assert_trees_all_equal(state["terms"]["scaled"], saved["terms"]["scaled"])
    assert state["step"] == 3
    assert state["terms"]["noise"]["count"] == 0
    with pytest.warns(jr.StateChangedWarning, match="term 'scaled' is gone"):
        objective_of("noise", "faded").restored(state)


def test_a_rule_that_was_added_begins_with_the_weight_given():
    with pytest.warns(jr.StateChangedWarning, match="what a rule chose begins anew, for it was not saved"):
        state = objective_of("scaled", "ruled").restored(state_of(objective_of("scaled")))
    np.testing.assert_allclose(state["weights"]["ruled"], 0.3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: {**s, "version": 99},
            ValueError,
            "version 99, and this jaxreg knows up to 1.*newer release",
        ),
        (lambda s: {**s, "momentum": 1.0}, ValueError, r"of something else: it has \['momentum'\]"),
        (
            lambda s: {**s, "step": np.zeros(2)},
            ValueError,
            r"its step has float32\[2\], where now there is int32",
        ),
        (
            lambda s: {
                **s,
                "terms": {"scaled": {"square": np.zeros(3), "weight": s["terms"]["scaled"]["weight"]}},
            },
            ValueError,
            r"term 'scaled': the saved state is of another term: it has float32\[3\] at 'square'",
        ),
        (lambda s: 3, TypeError, "takes a state that was saved, a dict of arrays, got int"),
    ],
)
def test_the_state_of_another_objective_is_refused(change, error, message):
    objective = objective_of("scaled", "faded")
    with pytest.raises(error, match=message):
        objective.restored(change(state_of(objective)))


def test_a_state_of_an_earlier_release_has_no_version():
    objective = objective_of("scaled", "faded")
    state = state_of(objective)
    old = {name: leaf for name, leaf in state.items() if name != "version"}
    chex.assert_trees_all_equal(objective.restored(old), state)
    (loss, out), _ = objective.value_and_grad(X, state=old)  # and goes on as it is
    assert "version" not in out.state
    assert jnp.isfinite(loss)
