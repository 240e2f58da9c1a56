"""Terms that remember: against NumPy loops, and the same state whether a batch comes whole or in parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxreg as jr

M = jr.memory
RNG = np.random.default_rng(0)
STEPS, B, T, V, D = 5, 6, 4, 5, 3


def batches():
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        yield jr.TokenBatch.from_arrays(
            mask=rng.random((B, T)) < 0.7,
            inputs=jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
            target_tokens=rng.integers(0, V, (B, T)),
            logprobs=jnp.asarray(-rng.uniform(0.5, 3, (B, T)), jnp.float32),
            advantages=jnp.asarray(rng.normal(size=B) * 3 + 2, jnp.float32),
        )


def forward(params, batch):
    return batch["inputs"] @ params["w"]


def start():
    return {"w": jnp.asarray(np.random.default_rng(9).normal(size=(D, V)), jnp.float32)}


def objective_of(**more):
    params = start()
    terms = [
        dict(name="z", fn=M.RunningScale(term=jr.regularizers.ZLoss(), decay=0.9), weight=0.1),
        dict(
            name="anchor",
            fn=M.MovingReference(term=jr.regularizers.KL(), forward=forward, params=params, decay=0.8),
            weight=0.5,
        ),
    ]
    ppo = M.RunningAdvantages(term=jr.losses.PPO(inputs="logits"), decay=0.7)
    return jr.compose(ppo, terms, forward=forward, **more)


def test_a_running_scale_is_that_of_numpy():
    objective = objective_of()
    params, state, square, weight = start(), objective.init(), 0.0, 0.0
    for batch in batches():
        (_, out), _ = objective.value_and_grad(params, batch, state=state)
        raw = float(jr.regularizers.ZLoss()(forward(params, batch), batch)[0])
        scale = np.sqrt(square / weight) if weight else 1.0
        np.testing.assert_allclose(out.regularizers["z"].value, raw / scale, rtol=1e-5)
        np.testing.assert_allclose(out.regularizers["z"].custom["raw"], raw, rtol=1e-5)
        square, weight, state = 0.9 * square + 0.1 * raw**2, 0.9 * weight + 0.1, out.state


def test_a_moving_reference_is_a_mean_of_the_parameters():
    objective = objective_of()
    params, state = start(), objective.init()
    reference = np.asarray(params["w"], np.float64)
    for i, batch in enumerate(batches()):
        params = {"w": start()["w"] + 0.1 * i}
        (_, out), _ = objective.value_and_grad(params, batch, state=state)
        there = batch.with_arrays(ref_logprobs=jnp.asarray(batch["inputs"] @ reference, jnp.float32))
        want = jr.regularizers.KL()(forward(params, batch), there)[0]
        np.testing.assert_allclose(out.regularizers["anchor"].value, want, rtol=1e-4, atol=1e-6)
        reference = 0.8 * reference + 0.2 * np.asarray(params["w"], np.float64)
        state = out.state
    np.testing.assert_allclose(state["terms"]["anchor"]["params"]["w"], reference, rtol=1e-5)


def test_running_advantages_are_those_of_numpy():
    loss = M.RunningAdvantages(term=jr.losses.ImportanceSampling(), decay=0.7)
    objective = jr.compose(loss)
    state, mean, square, weight = objective.init(), 0.0, 0.0, 0.0
    for batch in batches():
        x = batch["logprobs"] - 0.1
        (value, out), _ = objective.value_and_grad(x, batch, state=state)
        a = np.asarray(batch["advantages"], np.float64)
        own = a
        if weight:
            m, q = mean / weight, square / weight
            own = (a - m) / np.sqrt(q - m * m)
        want = jr.losses.ImportanceSampling()(x, batch.with_arrays(advantages=jnp.asarray(own, jnp.float32)))[
            0
        ]
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-6)
        there = a[np.asarray(batch.mask).any(1)]
        mean, square = 0.7 * mean + 0.3 * there.mean(), 0.7 * square + 0.3 * (there**2).mean()
        weight, state = 0.7 * weight + 0.3, out.state


@pytest.mark.parametrize("norms", [False, jr.GradNorms(wrt="outputs")])
def test_parts_remember_what_the_whole_does(norms):
    objective = objective_of(track_grad_norms=norms)
    state = states = in_loop = objective.init()
    params = start()
    for batch in batches():
        (loss, out), grads = objective.value_and_grad(params, batch, state=state)
        got = jr.accumulate(objective, params, batch, steps=3, state=states)
        chex.assert_trees_all_close(got[0][1].state, out.state, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close((got[0][0], got[1]), (loss, grads), rtol=1e-4, atol=1e-6)
        sums = None
        for part in batch.split(2):
            sums = jr.add_part(objective, sums, params, part, state=in_loop)
        _, told = jr.finish_parts(objective, sums, params, state=in_loop)[0]
        chex.assert_trees_all_close(told.state, out.state, rtol=1e-4, atol=1e-6)
        state, states, in_loop = out.state, got[0][1].state, told.state
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_devices_remember_what_the_whole_does():
    objective = objective_of()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def own(params, batch, state):
        return jr.accumulate(objective, params, batch, steps=1, state=state, axis_name="data")

    sharded = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    batch, state = next(batches()), objective.init()
    (_, got), _ = jax.jit(sharded)(start(), batch, state)
    (_, want), _ = objective.value_and_grad(start(), batch, state=state)
    chex.assert_trees_all_close(got.state, want.state, rtol=1e-5, atol=1e-6)


def test_the_state_is_of_one_shape_and_compiles_once():
    objective = objective_of()
    abstract = jax.eval_shape(objective.init)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, batch):
        return objective.value_and_grad(start(), batch, state=state)[0][1].state

    state = objective.init()
    for batch in batches():
        state = step(state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)


def test_what_is_not_finite_is_not_remembered():
    term = M.RunningScale(term=lambda x, batch: jnp.sum(x), decay=0.5)
    objective = jr.compose(lambda x, batch: jnp.sum(x), [dict(name="s", fn=term, weight=1.0)])
    _, out = objective(jnp.array([2.0]), state=objective.init())
    _, after = objective(jnp.array([jnp.nan]), state=out.state)
    chex.assert_trees_all_equal(after.state["terms"], out.state["terms"])


def test_what_is_asked_for_is_passed_on():
    def noisy(x, batch, *, key):
        return jnp.sum(x) + jax.random.normal(key)

    term = M.RunningScale(term=noisy)
    objective = jr.compose(lambda x, batch: jnp.sum(x), [dict(name="s", fn=term, weight=1.0)])
    with pytest.raises(ValueError, match="term 's': it asks for a random key"):
        objective(jnp.ones(2), state=objective.init())
    assert jnp.isfinite(objective(jnp.ones(2), state=objective.init(), key=jax.random.key(0))[0])
    with pytest.raises(ValueError, match="term 's': it asks for state: pass state=objective.init()"):
        objective(jnp.ones(2), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: M.RunningScale(term=jr.regularizers.L1(), decay=1.0), "RunningScale: decay is within 0"),
        (lambda: M.RunningScale(term=jr.regularizers.L1(), floor=0.0), "floor is a positive number"),
        (
            lambda: M.RunningScale(term=M.RunningScale(term=jr.regularizers.L1())),
            "the term inside, RunningScale, carries a state of its own",
        ),
        (lambda: M.RunningAdvantages(term=jr.losses.PPO(), decay=-0.1), "RunningAdvantages: decay"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_without_advantages_is_told():
    objective = jr.compose(M.RunningAdvantages(term=jr.losses.PPO()))
    with pytest.raises(KeyError, match="RunningAdvantages: the batch has no array 'advantages'"):
        objective(-jnp.ones((1, 2)), {"logprobs": -jnp.ones((1, 2))}, state=objective.init())


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.float32])
def test_advantages_far_from_0_keep_their_digits_whatever_their_dtype(dtype):
    loss = M.RunningAdvantages(term=jr.losses.ImportanceSampling(), decay=0.5)
    objective, x = jr.compose(loss), jnp.zeros((4, 1))
    state, rng = objective.init(), np.random.default_rng(0)
    for _ in range(30):
        advantages = (10000 if dtype != np.float16 else 300) + rng.integers(-2, 3, 4)
        batch = {"logprobs": x, "advantages": advantages.astype(dtype)}
        last, state = state, objective.value_and_grad(x, batch, state=state)[0][1].state
    spread = float(jnp.sqrt(last["terms"]["base_loss"]["square"]))
    assert 0.9 < spread < 1.8  # of -2 … 2 it is √2
    gradient = objective.value_and_grad(x, batch, state=last)[1]
    own = (advantages - float(last["terms"]["base_loss"]["mean"])) / spread
    np.testing.assert_allclose(gradient[:, 0], -own / 4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_reference_of_narrow_params_moves_by_small_steps(dtype):
    anchor = M.MovingReference(
        term=jr.regularizers.KL(), forward=forward, params={"w": jnp.ones((D, V), dtype)}, decay=0.999
    )
    state, moved = anchor.init(), {"w": jnp.full((D, V), 2.0, dtype)}
    for _ in range(100):
        state = anchor.remember(state, value=0.0, metrics={}, params=moved)
    np.testing.assert_allclose(state["params"]["w"], 2 - 0.999**100, rtol=1e-5)
    objective = jr.compose(
        jr.losses.CrossEntropy(inputs="logits"), [dict(name="a", fn=anchor, weight=1.0)], forward=forward
    )
    _, out = objective(moved, next(batches()), state=objective.init())
    assert out.state["terms"]["a"]["params"]["w"].dtype == jnp.float32


def test_a_scale_of_the_params_own_penalty_is_the_wholes_in_parts():
    decay = dict(name="d", fn=M.RunningScale(term=jr.regularizers.WeightL2()), weight=0.1)
    objective = jr.compose(jr.losses.CrossEntropy(inputs="logits"), [decay], forward=forward)
    batch, state = next(batches()), objective.init()
    _, want = objective(start(), batch, state=state)
    (_, got), _ = jr.accumulate(objective, start(), batch, steps=3, state=state)
    chex.assert_trees_all_close(
        (got.state, got.regularizers["d"].custom), (want.state, want.regularizers["d"].custom), rtol=1e-5
    )
