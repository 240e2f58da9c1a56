"""What an independent review found, and must stay mended."""

import gc
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close

import jaxreg as jr


def spec(name, fn, weight=1.0, **kw):
    return jr.RegularizerSpec(name=name, fn=fn, weight=weight, **kw)


def base(x, batch):
    return jnp.sum(x)


def test_byte_sized_targets_reach_the_whole_vocabulary():
    batch = jr.TokenBatch.pack([{"target_tokens": np.frombuffer(b"hello world", np.uint8)}])
    term = jr.losses.CrossEntropy(inputs="logits", reduction="token_sum")
    close(term(jnp.zeros((2, 12, 256)), batch)[0], 11 * np.log(256))
    batch = jr.TokenBatch.from_arrays(target_tokens=jnp.ones((1, 2)))
    with pytest.raises(TypeError, match="'target_tokens' are token numbers"):
        term(jnp.zeros((1, 2, 3)), batch)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "term",
    [
        jr.losses.CrossEntropy(inputs="logits"),
        jr.regularizers.Entropy(),
        jr.regularizers.ZLoss(),
        jr.regularizers.KL(reference="ref"),
        jr.regularizers.L1(),
    ],
)
def test_a_token_of_weight_zero_puts_nothing_into_anything(term, bad):
    batch = jr.TokenBatch.from_arrays(
        weights=jnp.array([[0.0, 1.0]]), target_tokens=jnp.zeros((1, 2), int), ref=jnp.zeros((1, 2, 3))
    )
    noise = jnp.zeros((1, 2, 3)).at[0, 0].set(bad)
    objective = jr.compose(term, forward=lambda p, b: jnp.ones((1, 2, 3)) @ p + noise)
    (_, out), grads = objective.value_and_grad(jnp.ones((3, 3)), batch)
    chex.assert_tree_all_finite(grads)
    assert "nonfinite" not in out.to_dict()


def test_a_key_by_position_is_refused_and_not_forgotten():
    for who, build in {
        "forward": lambda f: jr.compose(base, forward=f),
        "term 't'": lambda f: jr.compose(base, [spec("t", f)]),
    }.items():
        with pytest.raises(TypeError, match=rf"{who}: it takes 'key' by position.*\*, key"):
            build(lambda x, batch, key=None: x)


def test_the_model_and_a_term_named_forward_have_keys_of_their_own():
    def noise(x, batch, *, key):
        return jnp.sum(x), {"n": jax.random.normal(key, (3,))[0]}

    objective = jr.compose(
        lambda x, b: (jnp.sum(x), {"x0": x[0]}),
        [spec("forward", noise)],
        forward=lambda p, b, *, key: p * 0 + jax.random.normal(key, (3,)),
    )
    _, out = objective(jnp.ones(3), key=jax.random.key(0))
    assert out.base_loss.custom["x0"] != out.regularizers["forward"].custom["n"]


def test_the_derivative_with_respect_to_a_weight_is_the_value_at_weight_zero_too():
    objective = jr.compose(base, [spec("l2", lambda x, b: jnp.sum(x**2), 0.0)])
    loss = lambda w: objective.with_weights({"l2": w})(jnp.array([1.0, 2.0, 3.0]))[0]
    assert float(jax.grad(loss)(0.0)) == 14


def test_l2_sp_does_not_broadcast():
    with pytest.raises(ValueError, match=r"at 'w' x has shape \(4, 3\), but the reference has \(4, 1\)"):
        jr.regularizers.L2SP(reference={"w": jnp.ones((4, 1))})({"w": jnp.ones((4, 3))}, None)


def test_weights_of_both_signs_that_sum_to_zero_are_not_hidden():
    batch = jr.TokenBatch.from_arrays(weights=jnp.array([[1.0, -1.0]]))
    assert not np.isfinite(batch.mean(jnp.array([[1.0, 2.0]])))


def test_a_masked_row_counts_alike_however_the_batch_was_made():
    data = [
        {"a": [1.0, 2], "reward": 5.0, "mask": [0, 0]},
        {"a": [3.0, 4], "reward": 1.0, "mask": [1, 1]},
    ]
    packed = jr.TokenBatch.pack(data, length_buckets=[2], row_buckets=[2])
    made = jr.TokenBatch.from_arrays(mask=packed.mask, **packed.arrays)
    assert float(packed.mean(packed["reward"])) == float(made.mean(made["reward"])) == 1


def test_what_terms_close_over_is_freed_with_the_objective():
    def run():
        big = jnp.ones(100_000)
        objective = jr.compose(lambda x, b: jnp.sum(x), forward=lambda p, b: p * big[:4])
        objective.value_and_grad(jnp.ones(4))

    run()
    gc.collect()
    before = len([a for a in jax.live_arrays() if a.size == 100_000])
    for _ in range(5):
        run()
    gc.collect()
    assert len([a for a in jax.live_arrays() if a.size == 100_000]) <= before


def test_an_objective_can_be_pickled():
    start = {"w": jnp.ones(3)}
    terms = [spec("sp", jr.regularizers.L2SP(reference=start), on="params"), spec("e", jr.regularizers.L2())]
    objective = jr.compose(jr.losses.CrossEntropy(), terms, forward=_pick)
    copy = pickle.loads(pickle.dumps(objective))
    params, batch = {"w": 2 * jnp.ones((1, 3))}, jr.TokenBatch.from_arrays(mask=jnp.ones((1, 3), bool))
    with pytest.raises(ValueError, match="did the spec forget"):
        copy(params, batch)  # and it runs: the reference is its own
    assert copy.plan is objective.plan


def _pick(params, batch):
    return params["w"]


def test_nnx_paths_and_patterns():
    _, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    from jaxreg.base.paths import leaf_paths, select_leaves

    assert leaf_paths({"head": params}) == ["head/bias", "head/kernel"]
    assert select_leaves({"head": params}, "*/kernel", "x") == [False, True]
    assert select_leaves({"blocks": [params, params]}, "blocks/[1]", "x") == [False, False, True, True]
    with pytest.raises(ValueError, match="'haed' matches none"):
        select_leaves({"head": params}, ("head", "haed"), "x")


class Weak:
    def __init__(self, first, following):
        self.first, self.following = first, following

    def init(self):
        return self.first

    def __call__(self, x, batch, *, state):
        return jnp.sum(x), {}, self.following(state)


def test_a_state_keeps_its_type():
    traces = []

    def following(state):
        traces.append(1)
        return state + 1.0

    objective = jr.compose(base, [spec("s", Weak(0.0, following))])
    state = objective.init()
    for _ in range(3):
        _, out = objective(jnp.ones(2), state=state)
        state = out.state
    assert len(traces) == 1
    wrong = jr.compose(base, [spec("s", Weak(0.0, lambda s: jnp.zeros(2)))])
    with pytest.raises(TypeError, match="'s': its next state differs"):
        wrong(jnp.ones(2), state=wrong.init())


def test_mixed_columns_are_float32():
    batch = jr.TokenBatch.pack([{"a": [1, 2]}, {"a": [0.5]}])
    assert batch["a"].dtype == np.float32


def test_an_exception_inside_a_term_names_the_term():
    objective = jr.compose(base, [spec("broken", lambda x, b: b["foo"])])
    with pytest.raises(KeyError) as caught:
        objective(jnp.ones(2), {})
    assert any("term 'broken'" in note for note in caught.value.__notes__)
    scheduled = jr.compose(base, [spec("s", base, lambda step: 0.1 if step < 10 else 1.0)])
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        scheduled(jnp.ones(2), state=scheduled.init())
    assert any("schedule of term 's'" in note and "jnp.where" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: jr.compose(jr.losses.CrossEntropy),
            TypeError,
            r"the class itself.*CrossEntropy\(...\)",
        ),
        (lambda: jr.compose(base, None), TypeError, "regularizers is a sequence"),
        (lambda: jr.compose(base, base), TypeError, "regularizers is a sequence"),
        (lambda: jr.compose(base, forward=lambda p: p), TypeError, "forward: fn is called as"),
        (lambda: spec("t", base, 1e300), ValueError, "'t': a weight is finite"),
        (
            lambda: jr.compose(base, track_grad_norms=jr.GradNorms(params="head")),
            ValueError,
            "give compose",
        ),
        (lambda: jr.TokenBatch.pack([{"a": [1.0]}], length_buckets=[]), TypeError, "length_buckets"),
        (lambda: jr.TokenBatch.pack([{"a": [1.0]}])["lengths"], KeyError, "say batch.lengths"),
        (lambda: spec("loss_total", base), ValueError, "means something else"),
    ],
)
def test_messages(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_repr_and_truth(rng):
    objective = jr.compose(base, [spec("a", base, lambda step: 1.0), spec("b", base)])
    assert "a: schedule" in repr(objective)
    assert "a: 0" in repr(objective.without("a"))
    assert repr(jax.tree.map(lambda a: jnp.stack([a, a]), objective))
    assert jr.TokenBatch.from_arrays(mask=jnp.ones((1, 2), bool))
