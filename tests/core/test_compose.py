"""An objective is the sum written by hand, wherever JAX may put it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TERMS, close, drift, l1, l2, logprobs, nll, specs, token_batch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxreg as jr


@pytest.fixture
def batch(rng):
    return token_batch(rng)


@pytest.fixture
def x(rng, batch):
    return logprobs(rng, batch)


def by_hand(x, batch):
    return nll(x, batch)[0] + 0.5 * l1(x, batch) + 0.1 * l2(x, batch)[0] + 0.2 * drift(x, batch)


WEIGHTS = {"l1": 0.5, "l2": 0.1, "drift": 0.2}


@pytest.mark.parametrize("track", [False, True, jr.GradNorms(per_datum=True)])
def test_it_is_the_sum_written_by_hand(x, batch, track):
    objective = jr.compose(nll, specs(**WEIGHTS), track_grad_norms=track)
    (loss, out), grads = objective.value_and_grad(x, batch)
    want, want_grads = jax.value_and_grad(by_hand)(x, batch)
    close(loss, want)
    close(grads, want_grads)
    close(out.loss_total, want)
    close(objective(x, batch)[0], want)
    close(out.base_loss.value, nll(x, batch)[0])
    close(out.base_loss.custom["lowest"], x.min())
    close(out.regularizer_total, want - nll(x, batch)[0])
    for name, term in out.regularizers.items():
        assert term.name == name
        close(term.weight, WEIGHTS[name])
        close(term.contribution, WEIGHTS[name] * term.value)
    close(out.regularizers["l2"].custom["rms"] ** 2, out.regularizers["l2"].value)


def test_order_is_kept_through_jit_and_to_dict(x, batch):
    objective = jr.compose(nll, specs(l2=1.0, drift=1.0, l1=1.0))
    _, out = jax.jit(objective)(x, batch)
    assert list(out.regularizers) == list(out.to_dict()["regularizers"]) == ["l2", "drift", "l1"]


def test_specs_may_be_mappings_and_a_generator(x, batch):
    maps = ({"name": n, "fn": f, "weight": WEIGHTS[n]} for n, f in TERMS.items())
    close(jr.compose(nll, maps)(x, batch)[0], by_hand(x, batch))


def test_jax_value_and_grad_of_it_equals_its_own(x, batch):
    objective = jr.compose(nll, specs(**WEIGHTS))
    (loss, _), grads = objective.value_and_grad(x, batch)
    (jax_loss, _), jax_grads = jax.value_and_grad(objective, has_aux=True)(x, batch)
    close(loss, jax_loss)
    close(grads, jax_grads, rtol=1e-6)


def test_inside_jit_vmap_scan_and_checkpoint(x, batch):
    objective = jr.compose(nll, specs(**WEIGHTS), track_grad_norms=True)
    (loss, out), grads = objective.value_and_grad(x, batch)

    jitted = jax.jit(lambda o, x, b: o.value_and_grad(x, b))  # the objective as an argument
    chex.assert_trees_all_close(jitted(objective, x, batch), ((loss, out), grads), rtol=1e-5, atol=1e-6)

    xs = jnp.stack([x, 2 * x])
    (losses, outs), _ = jax.vmap(lambda x: objective.value_and_grad(x, batch))(xs)
    close(losses[0], loss)
    close(outs.regularizers["l1"].grad_norm[0], out.regularizers["l1"].grad_norm)

    def step(x, _):
        (loss, out), grads = objective.value_and_grad(x, batch)
        return x - 0.1 * grads, out

    _, steps = jax.lax.scan(step, x, length=3)
    close(steps.loss_total[0], loss)
    first = jax.tree.map(lambda a: a[0], steps)
    assert first.to_dict()["loss_total"] == pytest.approx(float(loss), rel=1e-5)

    remat = jax.checkpoint(lambda x: objective(x, batch)[0])
    close(jax.grad(remat)(x), grads)


def test_it_can_be_differentiated_with_respect_to_its_weights(x, batch):
    objective = jr.compose(nll, specs(**WEIGHTS))
    grads = jax.grad(lambda o: o(x, batch)[0])(objective)
    close(grads.constants["l1"], l1(x, batch))


def test_sharded_over_eight_devices(rng):
    batch = jr.TokenBatch.from_arrays(ref=-rng.uniform(0.1, 3, (16, 32)).astype(np.float32))
    x = logprobs(rng, batch)
    objective = jr.compose(nll, specs(**WEIGHTS), track_grad_norms=jr.GradNorms(per_datum=True))
    want = objective.value_and_grad(x, batch)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    got = objective.value_and_grad(put(x), put(batch))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[1].sharding.spec == PartitionSpec("data")


def test_changing_weights_and_building_again_compile_nothing(x, batch):
    fn = chex.assert_max_traces(l1, n=1)

    def build(weight):
        return jr.compose(
            nll,
            [dict(name="a", fn=fn, weight=weight), dict(name="b", fn=l2, weight=0.1)],
            track_grad_norms=True,
        )

    objective = build(0.5)
    objective.value_and_grad(x, batch)
    for changed in (
        objective,
        objective.with_weights({"a": 2}),
        objective.with_weights({"a": np.float64(0.25), "b": jnp.asarray(1.0)}),
        objective.without("a"),
        objective.only("b"),
        build(0.125),
        build(np.float32(3)),
    ):
        changed.value_and_grad(x, batch)


def test_an_equal_builtin_term_compiles_nothing(x, batch, caplog):
    def build():
        return jr.compose(
            jr.losses.CrossEntropy(),
            [jr.RegularizerSpec(name="kl", fn=jr.regularizers.KL(reference="ref"), weight=0.1)],
        )

    build().value_and_grad(x, batch)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        build().value_and_grad(x, batch)
    assert not [r for r in caplog.records if "Finished" in r.message or "Compiling" in r.message]


def test_terms_that_hold_arrays_are_arguments_and_not_constants(x):
    start = {"w": jnp.ones((3, 3)), "b": jnp.zeros(3)}
    objective = jr.compose(
        lambda out, batch: jnp.sum(out),
        [jr.RegularizerSpec(name="sp", fn=jr.regularizers.L2SP(reference=start), weight=1.0, on="params")],
        forward=lambda p, batch: p["w"] + p["b"][None],
    )
    params = jax.tree.map(lambda a: a + 1, start)
    (loss, _), grads = objective.value_and_grad(params)
    close(loss, jnp.sum(params["w"] + params["b"][None]) + 12)
    close(grads["w"], 3 * np.ones((3, 3)))
    assert len(jax.tree.leaves(objective)) == 3  # the weight, and the two arrays of the term
    text = jax.jit(lambda o, p: o(p)[0]).lower(objective, params).as_text()
    assert "dense<" not in text.split("func.func")[0]


def test_weights_by_name(x, batch):
    objective = jr.compose(nll, specs(**WEIGHTS))
    assert {n: pytest.approx(float(w)) for n, w in objective.weights().items()} == WEIGHTS
    assert objective.names == ("l1", "l2", "drift")
    changed = objective.with_weights({"l1": 7})
    assert float(changed.weights()["l1"]) == 7
    assert float(objective.weights()["l1"]) == 0.5
    assert [float(w) for w in objective.only("l2").weights().values()] == pytest.approx([0, 0.1, 0])
    assert "l1: 0.5" in repr(objective)


def test_a_weight_may_be_traced(x, batch):
    @jax.jit
    def loss(weight):
        objective = jr.compose(nll, [jr.RegularizerSpec(name="l1", fn=l1, weight=weight)])
        return objective(x, batch)[0]

    close(loss(0.5), nll(x, batch)[0] + 0.5 * l1(x, batch))


def test_a_term_at_weight_zero_adds_nothing_though_it_be_nan(x, batch):
    def broken(x, batch):
        return batch.sum(jnp.sqrt(x - 100.0))

    terms = [*specs(l1=0.5), jr.RegularizerSpec(name="broken", fn=broken, weight=1.0)]
    objective = jr.compose(nll, terms, track_grad_norms=True)
    (_, out), grads = objective.value_and_grad(x, batch)
    assert not np.isfinite(np.asarray(grads)).all()
    assert out.to_dict()["nonfinite"] == ["broken"]
    assert out.to_dict()["regularizers"]["broken"]["value"] is None

    (loss, out), grads = objective.without("broken").value_and_grad(x, batch)
    close(loss, nll(x, batch)[0] + 0.5 * l1(x, batch))
    close(grads, jax.grad(lambda x: nll(x, batch)[0] + 0.5 * l1(x, batch))(x))
    assert out.to_dict()["nonfinite"] == ["broken"]  # it says so, and does no harm


SCHEDULE = optax.linear_schedule(0.0, 1.0, 4)


def test_a_schedule_moves_with_the_state(x, batch):
    fn = chex.assert_max_traces(l1, n=1)
    objective = jr.compose(nll, [dict(name="l1", fn=fn, weight=SCHEDULE), *specs(l2=0.5)])
    state = objective.init()
    weights = []
    for _ in range(5):
        (_, out), _ = objective.value_and_grad(x, batch, state=state)
        weights.append(float(out.regularizers["l1"].weight))
        state = out.state
    assert weights == [0, 0.25, 0.5, 0.75, 1]
    held = objective.with_weights({"l1": 3.0})
    assert float(held.value_and_grad(x, batch, state=state)[0][1].regularizers["l1"].weight) == 3
    assert float(objective.weights(state)["l1"]) == 1


def test_a_schedule_never_goes_below_zero(x, batch):
    objective = jr.compose(nll, [dict(name="l1", fn=l1, weight=lambda step: 0.5 - 0.1 * step)])
    assert float(objective.weights({"step": 3})["l1"]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"term 'l1': its schedule gives -1\.5, and a weight is ≥ 0"):
        objective.weights({"step": 20})


def test_nothing_needs_a_state_unless_something_does(x, batch):
    objective = jr.compose(nll, specs(l1=0.5))
    assert objective.init() == {}
    assert objective(x, batch)[1].state == {}


class Smoothed:
    """A stateful term: its value against the running mean of the ones before."""

    def init(self):
        return jnp.zeros(())

    def __call__(self, x, batch, *, state):
        value = batch.mean(x)
        return value - state, {"mean": state}, 0.5 * state + 0.5 * value


def test_a_stateful_term_carries_its_state(x, batch):
    objective = jr.compose(nll, [jr.RegularizerSpec(name="s", fn=Smoothed(), weight=1.0)])
    state = objective.init()
    mean, value = 0.0, float(batch.mean(x))
    for _ in range(3):
        (_, out), _ = objective.value_and_grad(x, batch, state=state)
        state = out.state
        assert float(out.regularizers["s"].value) == pytest.approx(value - mean, abs=1e-6)
        mean = 0.5 * mean + 0.5 * value


def noisy(x, batch, *, key):
    return jax.random.uniform(key)


def test_a_terms_randomness_is_its_own(x, batch):
    terms = [jr.RegularizerSpec(name="n1", fn=noisy, weight=1.0)]
    key = jax.random.key(0)
    _, alone = jr.compose(nll, terms)(x, batch, key=key)
    terms.insert(0, jr.RegularizerSpec(name="n2", fn=noisy, weight=1.0))
    _, both = jr.compose(nll, terms)(x, batch, key=key)
    assert alone.regularizers["n1"].value == both.regularizers["n1"].value
    assert both.regularizers["n1"].value != both.regularizers["n2"].value


def test_bfloat16_is_accumulated_in_float32(rng):
    batch = jr.TokenBatch.from_arrays(ref=jnp.zeros((64, 512), jnp.bfloat16))
    x = jnp.asarray(-rng.uniform(0.1, 3, (64, 512)), jnp.bfloat16)
    objective = jr.compose(nll, specs(**WEIGHTS), track_grad_norms=True)
    (loss, out), grads = objective.value_and_grad(x, batch)
    assert loss.dtype == out.regularizers["l1"].grad_norm.dtype == jnp.float32
    assert grads.dtype == jnp.bfloat16
    close(loss, by_hand(x.astype(jnp.float32), batch), rtol=1e-4)


def test_float64_stays_float64(x64, rng):
    batch = token_batch(rng)
    x = jnp.asarray(-rng.uniform(0.1, 3, batch.shape))
    (loss, out), grads = jr.compose(nll, specs(l1=0.1), track_grad_norms=True).value_and_grad(x, batch)
    assert loss.dtype == grads.dtype == out.total_grad_norm.dtype == jnp.float64
    close(loss, nll(x, batch)[0] + 0.1 * l1(x, batch), rtol=1e-14)


def test_the_schema(x, batch):
    objective = jr.compose(nll, specs(l2=0.5), track_grad_norms=True)
    (_, out), _ = objective.value_and_grad(x, batch)
    got = out.to_dict()
    assert list(got) == [
        "loss_total",
        "base_loss",
        "regularizers",
        "regularizer_total",
        "total_grad_norm",
    ]
    assert list(got["base_loss"]) == ["value", "grad_norm", "custom"]
    assert list(got["regularizers"]["l2"]) == [
        "name", "value", "weight", "contribution", "grad_norm", "grad_norm_weighted", "custom",
    ]  # fmt: skip
    flat = out.to_flat_dict()
    assert flat["reg/l2/rms"] == got["regularizers"]["l2"]["custom"]["rms"]
    assert flat["loss/base/lowest"] == got["base_loss"]["custom"]["lowest"]
    assert all(type(v) is float for v in flat.values())
    assert objective(x, batch)[1].to_dict()["total_grad_norm"] is None
    assert "grad_norm/total" not in objective(x, batch)[1].to_flat_dict()
    with pytest.raises(TypeError, match="while JAX traces"):
        jax.jit(lambda x: objective(x, batch)[1].to_dict())(x)
    with pytest.raises(ValueError, match="take one first"):
        jax.vmap(lambda x: objective(x, batch)[1])(x[None]).to_dict()
