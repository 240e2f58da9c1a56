"""jr.of: terms on a field, or on something computed from the outputs."""

import pickle
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5))
BATCH = jr.TokenBatch.from_arrays(target_tokens=jnp.array([[1, 2, 3], [4, 0, 1]]))


class Heads(NamedTuple):
    policy: jax.Array
    value: jax.Array


def sampled(outputs, batch):
    logprobs = jax.nn.log_softmax(outputs["logits"])
    return jnp.take_along_axis(logprobs, batch["target_tokens"][..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    ("path", "outputs"),
    [
        ("logits", {"logits": LOGITS, "value": jnp.ones(2)}),
        ("heads/policy", {"heads": Heads(LOGITS, jnp.ones(2))}),
        ("0/logits", [{"logits": LOGITS}, jnp.ones(2)]),
    ],
)
@pytest.mark.parametrize("norms", [False, True])
def test_a_field_is_what_the_term_sees(path, outputs, norms):
    term = jr.losses.CrossEntropy(inputs="logits")
    entropy = dict(name="entropy", fn=jr.of(path, jr.regularizers.Entropy()), weight=0.3)
    objective = jr.compose(jr.of(path, term), [entropy], track_grad_norms=norms)
    (loss, _), gradient = objective.value_and_grad(outputs, BATCH)
    plain = jr.compose(term, [entropy | {"fn": jr.regularizers.Entropy()}], track_grad_norms=norms)
    (right, _), slope = plain.value_and_grad(LOGITS, BATCH)
    np.testing.assert_allclose(loss, right, rtol=1e-6)
    moved = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape == LOGITS.shape]
    chex.assert_trees_all_close(moved, [slope], rtol=1e-6)
    rest = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape != LOGITS.shape]
    assert all(not leaf.any() for leaf in rest)  # dense zeros, no error


def test_a_field_that_is_missing_is_named_with_those_there_are():
    objective = jr.compose(jr.of("logit", lambda x, batch: jnp.sum(x)))
    with pytest.raises(KeyError, match=r"dict has no field 'logit'; it has \['logits', 'value'\]"):
        objective({"logits": LOGITS, "value": jnp.ones(2)})
    with pytest.raises(TypeError, match=r'take a field of the outputs with jaxreg.of\("logits", term\)'):
        jr.compose(jr.losses.DPO())({"logits": LOGITS}, BATCH)


@pytest.mark.parametrize("bad", ["", "/", 3, None])
def test_a_view_is_a_path_or_a_function(bad):
    with pytest.raises(TypeError, match="a view is the path of a field or a function"):
        jr.of(bad, jr.losses.CrossEntropy())
    with pytest.raises(TypeError, match="it takes a view and a term"):
        jr.of("logits", jr.losses.CrossEntropy)


def test_a_view_is_computed_once_for_all_terms():
    outputs = {"logits": jax.random.normal(jax.random.key(1), (8, 64, 256))}
    batch = jr.TokenBatch.from_arrays(target_tokens=jnp.ones((8, 64), int))

    def flops(terms):
        specs = [
            dict(name=str(i), fn=jr.of(sampled, lambda x, b, i=i: b.mean(x ** (2 + i))), weight=0.1)
            for i in range(terms)
        ]
        objective = jr.compose(jr.of(sampled, jr.losses.CrossEntropy()), specs)
        return (
            objective.plan.compiled(jr.core.step.call)
            .lower(objective.leaves, outputs, batch, None, None)
            .compile()
            .cost_analysis()["flops"]
        )

    assert flops(4) < 1.1 * flops(0)


class Counting:
    def init(self):
        return jnp.zeros(())

    def __call__(self, x, batch, *, state, key):
        return jnp.sum(x) + jax.random.uniform(key) * 0, {}, state + 1


def test_what_a_term_asks_for_it_gets():
    objective = jr.compose(jr.of("a", Counting()))
    state = objective.init()
    _, out = objective({"a": jnp.ones(2)}, state=state, key=jax.random.key(0))
    assert out.state["terms"]["base_loss"] == 1
    assert jr.of("a", jr.losses.DPO()).rows_together == 2


def test_equal_ones_share_a_program_and_arrays_are_arguments():
    term = jr.regularizers.LogRatioL2(reference=jnp.zeros((2, 3)))
    a, b = (
        jr.compose(jr.of("x", jr.losses.CrossEntropy()), [dict(name="t", fn=jr.of("x", term), weight=w)])
        for w in (0.1, 0.2)
    )
    assert a.plan is b.plan
    assert len(jax.tree.leaves(a)) == 2  # the weight, and the reference
    again = pickle.loads(pickle.dumps(a))
    assert again.plan is a.plan
    assert hash(jr.of("x", jr.losses.CrossEntropy())) == hash(jr.of("x", jr.losses.CrossEntropy()))
    assert jr.of("x", jr.losses.CrossEntropy()) != jr.of("y", jr.losses.CrossEntropy())
