"""Micro-batches give what the whole batch gives: value, gradient, norms, Gramian, metrics, state."""

import dataclasses
import os
import warnings

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import jaxreg as jr

B, T, V, D = 8, 5, 7, 4
EXAMPLES = int(os.environ.get("JAXREG_COMPOSITES", "2"))  # each compiles two programs


def forward(params, batch):
    return jnp.tanh(batch["inputs"] @ params["body"]) @ params["head"]


def params(dtype=np.float32):
    rng = np.random.default_rng(1)
    return {
        "body": jnp.asarray(rng.normal(size=(D, D)), dtype),
        "head": jnp.asarray(rng.normal(size=(D, V)), dtype),
    }


def batch_of(seed=0, rows=B, dtype=np.float32):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, T)) < 0.7
    weights = rng.choice([0.0, -0.5, 0.3, 1.0, 2.0], (rows, T))
    mask[-1] = False
    return jr.TokenBatch.from_arrays(
        mask=jnp.asarray(mask),
        weights=jnp.asarray(weights, dtype),
        inputs=jnp.asarray(rng.normal(size=(rows, T, D)), dtype),
        target_tokens=jnp.asarray(rng.integers(0, V, (rows, T))),
        ref_logprobs=jnp.asarray(-rng.uniform(0.1, 3, (rows, T)), dtype),
        unwanted=jnp.asarray(rng.integers(0, 2, (rows, T)), dtype),
    )


def terms():
    R = jr.regularizers
    return [
        dict(name="kl", fn=R.KL(inputs="logits"), weight=0.3),
        dict(name="entropy", fn=R.Entropy(inputs="logits", reduction="datum_mean"), weight=0.2),
        dict(name="unlikely", fn=R.Unlikelihood(candidates="unwanted", inputs="logits"), weight=0.1),
        dict(name="z", fn=R.ZLoss(reduction="token_sum"), weight=1e-3),
        dict(name="decay", fn=R.WeightL2(), weight=0.05),
    ]


def objective_of(**more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jr.MixedReductionsWarning)
        return jr.compose(jr.losses.CrossEntropy(inputs="logits"), terms(), forward=forward, **more)


@dataclasses.dataclass(frozen=True)
class BySize:
    """An aggregator that is quickly compiled: coefficients of the squares of the norms."""

    wrt: str = "outputs"

    def __call__(self, gramian):
        squares = jnp.diagonal(gramian)
        return jnp.sum(squares) / (squares + jnp.sum(squares))


G = jr.GradNorms
ASKED = {
    "no norms": {},
    "outputs": {"track_grad_norms": G(wrt="outputs", gramian=True, absolutes=True, per_datum=True)},
    "params": {"track_grad_norms": G(gramian=True, absolutes=True)},
    "a filter, in chunks": {"track_grad_norms": G(params="head", gramian=True, chunk_size=2)},
    "outputs combined": {
        "aggregator": BySize(),
        "track_grad_norms": G(wrt="outputs", absolutes=True, per_datum=True),
    },
    "outputs combined, some params measured": {
        "aggregator": BySize(),
        "track_grad_norms": G(params="head", gramian=True),
    },
    "outputs combined, params measured": {"aggregator": BySize(), "track_grad_norms": True},
    "params combined": {"aggregator": BySize("params"), "track_grad_norms": G(gramian=True)},
}


def known(out):
    """An output without what differs on purpose: metrics of a kind that is not known."""
    return out.replace(state={}, aux=None, approximate=())


def agree(got, want, rtol=1e-5, atol=1e-6):
    (loss, out), grads = got
    (whole, wanted), slopes = want
    chex.assert_trees_all_close(
        (loss, known(out), grads), (whole, known(wanted), slopes), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("asked", ASKED)
def test_accumulated_is_whole(asked):
    objective = objective_of(**ASKED[asked])
    x, batch = params(), batch_of()
    want = objective.value_and_grad(x, batch)
    agree(jr.accumulate(objective, x, batch, steps=3), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("asked", ["a filter, in chunks", "params combined"])
def test_a_python_loop_gives_the_same(asked):
    objective = objective_of(**ASKED[asked])
    x, batch = params(), batch_of(rows=9)
    sums = None
    for part in batch.split(3, reweighted=("unwanted",)):
        sums = jr.add_part(objective, sums, x, part)
    agree(jr.finish_parts(objective, sums, x), objective.value_and_grad(x, batch), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("asked", "check_vma"),
    [("no norms", False), ("outputs", True), ("params", False), ("outputs combined", True)],
)
def test_over_eight_devices_it_is_the_whole_batchs(asked, check_vma):
    more = dict(ASKED[asked])
    if asked.startswith("outputs"):  # what it gives a datum is each device's own
        more["track_grad_norms"] = dataclasses.replace(more["track_grad_norms"], per_datum=False)
    objective = objective_of(**more)
    x, batch = params(), batch_of(rows=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def own(x, batch):
        return jr.accumulate(objective, x, batch, steps=2, axis_name="data")

    sharded = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    want = objective.value_and_grad(x, batch)
    agree(jax.jit(sharded)(x, batch), want, rtol=1e-5, atol=2e-6)


def squares(x, batch):
    return batch.mean(jnp.square(batch["inputs"] @ x)[..., 0]), {
        "odd": jnp.sum(x),
        "even": batch.mean(x[0, 0] * batch.mask),
    }


squares.additive = True
squares.metric_kinds = {"even": "sum"}
W = jnp.ones((D, 2))


def test_rules_and_norms_now_and_then_go_by_whole_batches():
    rule = jr.weighting.gradient_balance("kl")
    objective = objective_of(track_grad_norms=G(every=2, wrt="outputs"), weighting=rule)
    x, batch = params(), batch_of()
    state = states = objective.init()
    for age in (0, 1, 0):
        (loss, out), grads = jr.accumulate(objective, x, batch, steps=3, state=state)
        (whole, wanted), slopes = objective.value_and_grad(x, batch, state=states)
        state, states = out.state, wanted.state
        assert out.norms_age == age
        chex.assert_trees_all_close((loss, state, grads), (whole, states, slopes), rtol=1e-5, atol=2e-6)


def test_a_loop_measures_in_every_step_and_says_so():
    objective = objective_of(track_grad_norms=G(every=3, wrt="outputs"))
    batch, state = batch_of(rows=9), objective.init()
    for _ in range(2):
        sums = None
        for part in batch.split(3, reweighted=("unwanted",)):
            sums = jr.add_part(objective, sums, params(), part, state=state)
        (_, out), _ = jr.finish_parts(objective, sums, params(), state=state)
        (_, whole), _ = objective.value_and_grad(params(), batch, state=objective.init())
        assert out.norms_age == 0
        np.testing.assert_allclose(out.total_grad_norm, whole.total_grad_norm, rtol=2e-5)
        state = out.state


@pytest.mark.parametrize("counted", [{}, {"mask": "bool"}, {"weights": "float"}])
def test_mappings_of_rows_are_batches_too(counted):
    rng = np.random.default_rng(2)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.asarray(rng.integers(0, 4, 8))}
    if "mask" in counted:
        batch["mask"] = jnp.asarray(rng.random(8) < 0.5)
    if "weights" in counted:
        batch["weights"] = jnp.asarray(rng.uniform(0, 2, 8), jnp.float32)
    objective = jr.compose(
        jr.losses.CrossEntropy(inputs="logits", targets="y"),
        [dict(name="decay", fn=jr.regularizers.WeightL2(), weight=0.1)],
        forward=lambda w, batch: batch["x"] @ w,
        track_grad_norms=True,
    )
    w = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    steps = 3 if counted else 4
    agree(jr.accumulate(objective, w, batch, steps=steps), objective.value_and_grad(w, batch))
    if not counted:
        with pytest.raises(
            ValueError, match="3 steps do not divide 8 rows, and the batch has neither 'mask'"
        ):
            jr.accumulate(objective, w, batch, steps=3)


def test_a_loss_of_the_params_needs_no_model_and_unknown_metrics_are_not_guessed():
    objective = jr.compose(squares, track_grad_norms=G(gramian=True))
    batch = batch_of()
    (loss, out), grads = jr.accumulate(objective, W, batch, steps=3)
    (whole, wanted), slopes = objective.value_and_grad(W, batch)
    chex.assert_trees_all_close((loss, out.gramian, grads), (whole, wanted.gramian, slopes), rtol=1e-5)
    assert [*out.base_loss.custom] == ["even"]
    np.testing.assert_allclose(out.base_loss.custom["even"], wanted.base_loss.custom["even"], rtol=1e-5)


def test_what_forward_returns_beside_its_outputs_comes_back_by_micro_batch():
    def counting(params, batch):
        return forward(params, batch), {"tokens": jnp.sum(batch.mask)}

    loss = jr.losses.CrossEntropy(inputs="logits")
    objective = jr.compose(loss, forward=counting, has_aux=True, track_grad_norms=True)
    batch = batch_of()
    (_, out), _ = jr.accumulate(objective, params(), batch, steps=4)
    assert out.aux["tokens"].tolist() == [int(part.mask.sum()) for part in batch.split(4)]


def test_what_is_approximate_says_so():
    centred = jr.of(lambda x, batch: x, jr.regularizers.L2(center="mean"))
    spec = {"name": "c", "fn": centred, "weight": 1.0}
    base = jr.losses.CrossEntropy(inputs="logits")
    with pytest.raises(ValueError, match=r"term 'c': .* says that its parts do not add up .*'approximate'"):
        jr.accumulate(jr.compose(base, [spec], forward=forward), params(), batch_of(), steps=2)
    objective = jr.compose(base, [spec | {"additive": "approximate"}], forward=forward)
    batch = batch_of()
    (_, out), _ = jr.accumulate(objective, params(), batch, steps=2)
    assert out.approximate == ("c",)
    assert out.to_dict()["approximate"] == ["c"]
    parts = batch.split(2)
    own = [float(centred(forward(params(), part), part.as_local())[0] * part.share()) for part in parts]
    np.testing.assert_allclose(out.regularizers["c"].value, sum(own), rtol=1e-5)
    with pytest.raises(ValueError, match="term 'c': additive is True, False, 'same' or 'approximate'"):
        jr.compose(base, [spec | {"additive": "maybe"}], forward=forward)


def test_narrow_params_are_summed_in_float32():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
    objective = objective_of()
    _, grads = jr.accumulate(objective, narrow, batch_of(), steps=4)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, narrow)


def test_one_program_for_all_numbers():
    objective = objective_of()
    take = jax.jit(chex.assert_max_traces(lambda o, x, b: jr.accumulate(o, x, b, steps=2)[0][0], n=1))
    first = take(objective, params(), batch_of())
    assert take(objective.with_weights({"kl": 2.0}), params(), batch_of(5)) != first


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda o: jr.accumulate(o, W, None, steps=2),
            TypeError,
            "takes a TokenBatch, or a mapping .* NoneType",
        ),
        (
            lambda o: jr.accumulate(o, W, batch_of(), steps=2.0),
            TypeError,
            "steps is the number of micro-batches",
        ),
        (lambda o: jr.accumulate(o, W, batch_of(), steps=0), ValueError, "at least 1; got 0"),
        (lambda o: jr.accumulate(squares, W, batch_of(), steps=2), TypeError, "takes an objective"),
        (
            lambda o: jr.accumulate(o, batch_of()["ref_logprobs"], batch_of(), steps=2),
            ValueError,
            "x has the shape of the batch's tokens",
        ),
        (
            lambda o: jr.accumulate(o, W, batch_of(), steps=2, axis_name="data"),
            ValueError,
            "no axis 'data' is bound here",
        ),
        (
            lambda o: jr.accumulate(jr.compose(lambda x, batch: batch.mean(x)), W, batch_of(), steps=2),
            ValueError,
            "the base loss: .* does not say whether its parts add up .*fn.additive = True",
        ),
        (lambda o: jr.add_part(o, None, W, batch_of()), ValueError, "does not say that it is a part of one"),
        (
            lambda o: jr.finish_parts(o, jr.add_part(o, None, W, batch_of().split(2)[0]), W),
            ValueError,
            "datums that count were added, and the whole batch has .*: a part is missing",
        ),
        (
            lambda o: jr.finish_parts(objective_of(), jr.add_part(o, None, W, batch_of().split(2)[0]), W),
            ValueError,
            "the sums are of another objective, of 1 terms, and this one has 6",
        ),
        (
            lambda o: jr.finish_parts(
                o,
                jr.add_part(
                    o, jr.add_part(o, None, W, batch_of().split(2)[0]), W, batch_of(1, rows=4).split(2)[1]
                ),
                W,
            ),
            ValueError,
            "the parts are of several batches",
        ),
        (lambda o: jr.finish_parts(o, None, W), TypeError, "takes what add_part gave, got NoneType"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(jr.compose(squares))


def test_check_term_tries_whether_parts_add_up():
    batch = batch_of()
    x = -jnp.abs(batch["ref_logprobs"])
    jr.testing.check_term(jr.regularizers.KL(reference="ref_logprobs"), x - 0.1, batch, additive=True)
    jr.testing.check_term(squares, W, batch, additive=True, gradients=False, scales=False)
    with pytest.raises(jr.testing.TermCheckError, match="parts that add up: 2 parts give"):
        jr.testing.check_term(
            lambda x, batch: jnp.sqrt(1 + batch.mean(x) ** 2), x, batch, additive=True, log_ratios=False
        )


@st.composite
def composites(draw):
    """Some terms with some weights, of a batch that is ragged, weighted and has empty rows."""
    R = jr.regularizers
    made = {
        "entropy": R.Entropy(inputs="logits", reduction=draw(st.sampled_from(["token_mean", "datum_mean"]))),
        "kl": R.KL(inputs="logits", estimator=draw(st.sampled_from(["k1", "k2", "k3"]))),
        "unlikely": R.Unlikelihood(candidates="unwanted", inputs="logits"),
        "smooth": R.LabelSmoothing(),
        "l2": R.L2(center=0.5),
        "focal": R.Focal(inputs="logits"),
        "decay": R.WeightL2(),
    }
    names = draw(st.lists(st.sampled_from(sorted(made)), min_size=1, max_size=4, unique=True))
    specs = [dict(name=n, fn=made[n], weight=draw(st.floats(0, 2))) for n in names]
    asked = draw(st.sampled_from(["no norms", "outputs", "params", "outputs combined, params measured"]))
    return specs, ASKED[asked], draw(st.integers(0, 2**20)), draw(st.integers(1, 4))


@given(composites())
@settings(max_examples=EXAMPLES, deadline=None)
def test_random_composites_are_whole(drawn):
    specs, asked, seed, steps = drawn
    with jax.enable_x64(True):
        objective = jr.compose(jr.losses.CrossEntropy(inputs="logits"), specs, forward=forward, **asked)
        x, batch = params(np.float64), batch_of(seed, rows=6, dtype=np.float64)
        if seed % 5 == 0:  # nothing counts
            batch = batch.replace(weights=jnp.zeros_like(batch.weights))
        want = objective.value_and_grad(x, batch)
        agree(jr.accumulate(objective, x, batch, steps=steps), want, rtol=1e-10, atol=1e-12)


class Counter:
    """A term whose own call moves its state."""

    def init(self):
        return jnp.zeros((), jnp.int32)

    def __call__(self, x, batch, *, state):
        return batch.sum(x), {}, state + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective_of(**ASKED["outputs"]), "norms a datum are of the device's own rows"),
        (
            lambda: jr.compose(
                jr.losses.CrossEntropy(inputs="logits"),
                [dict(name="counter", fn=Counter(), weight=1.0, additive=True)],
                forward=forward,
            ),
            r"term 'counter': its own call moves its state, on each device .* method remember\(",
        ),
    ],
)
def test_what_is_no_whole_over_devices_is_refused(make, message):
    objective = make()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def own(x, batch):
        return jr.accumulate(objective, x, batch, steps=1, state=objective.init(), axis_name="data")

    with pytest.raises(ValueError, match=message):
        jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(params(), batch_of())


def test_a_part_by_itself_moves_nothing_that_goes_by_the_whole():
    part, _ = jr.TokenBatch.pack([{"x": [1.0, 2.0]}, {"x": [3.0]}]).split(2)
    x = part["x"]
    terms = [dict(name="l2", fn=jr.regularizers.L2(), weight=0.1)]
    faded = jr.compose(jr.losses.CrossEntropy(), [terms[0] | {"weight": lambda step: 1.0 / (1 + step)}])
    (_, out), _ = faded.value_and_grad(-x, part, state=faded.init())
    assert out.state["step"] == 1
    scaled = [dict(name="l2", fn=jr.memory.RunningScale(term=jr.regularizers.L2()), weight=0.1)]
    ruled = jr.compose(
        jr.losses.CrossEntropy(),
        terms,
        track_grad_norms=True,
        weighting=jr.weighting.gradient_share("l2", share=0.2),
    )
    for objective in (ruled, jr.compose(jr.losses.CrossEntropy(), scaled)):
        (_, out), _ = objective.value_and_grad(-x, part, state=objective.init())
        assert out.state == {}
        with pytest.raises(ValueError, match="term 'l2': .* out the report on a whole batch"):
            objective.value_and_grad(-x, part, state=out.state)
    combined = jr.compose(jr.losses.CrossEntropy(), terms, aggregator=BySize())
    with pytest.raises(
        ValueError, match=r"aggregator BySize\(\): the batch is a part of one .*jaxreg.accumulate"
    ):
        combined.value_and_grad(-x, part)


def test_an_aggregator_at_the_outputs_takes_the_memory_of_one_gradient():
    """Its second pass pulls one combination back, so that no term's own gradient is held."""
    x, batch = {"body": jnp.ones((D, 2000)), "head": jnp.ones((2000, V))}, batch_of()

    def held(**more):
        take = jax.jit(lambda x, b: jr.accumulate(objective_of(**more), x, b, steps=4)[1])
        return take.lower(x, batch).compile().memory_analysis().temp_size_in_bytes

    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(x))
    assert held(aggregator=BySize()) < held() + size / 2
    assert held(aggregator=BySize("params")) > held() + 3 * size


def test_what_saturates_in_one_batch_does_in_parts():
    batch = jr.TokenBatch.from_arrays(x=jnp.full((4, 3), 2e38))
    objective = jr.compose(capped)
    (whole, _), _ = objective.value_and_grad(jnp.ones(()), batch)
    (loss, _), _ = jr.accumulate(objective, jnp.ones(()), batch, steps=2)
    assert loss == whole == np.finfo(np.float32).max


def capped(x, batch):
    return jnp.minimum(batch.sum(x * batch["x"]), np.finfo(np.float32).max)


capped.additive = True


def test_what_stands_where_nothing_counts_is_not_read():
    batch = batch_of()
    odd = batch.with_arrays(unwanted=jnp.where(batch.counted, batch["unwanted"], jnp.nan))
    specs = [
        dict(name="u", fn=jr.regularizers.Unlikelihood(candidates="unwanted", inputs="logits"), weight=1.0)
    ]
    objective = jr.compose(jr.losses.CrossEntropy(inputs="logits"), specs, forward=forward)
    (loss, _), _ = jr.accumulate(objective, params(), odd, steps=2)
    np.testing.assert_allclose(loss, objective(params(), odd)[0], rtol=1e-5)


def test_a_term_on_params_is_counted_once_where_no_datum_counts():
    data = [{"x": np.ones(2), "weights": np.zeros(2)}, {"x": np.ones(3), "weights": np.zeros(3)}]
    decay = [dict(name="decay", fn=jr.regularizers.WeightL2(), weight=1.0)]
    objective = jr.compose(jr.losses.CrossEntropy(), decay, forward=lambda w, batch: -w * batch["x"])
    parts = [jr.TokenBatch.pack([own], totals_of=data) for own in data]
    total = sum(objective(jnp.ones(()), part)[0] for part in parts)
    np.testing.assert_allclose(total, objective(jnp.ones(()), jr.TokenBatch.pack(data))[0], rtol=1e-6)
