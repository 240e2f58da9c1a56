"""Every bad input gets an error that names the term and says what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr


def base(x, batch):
    return jnp.sum(x)


def spec(**fields):
    return jr.RegularizerSpec(**{"name": "t", "fn": base, "weight": 1.0} | fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": ""}, ValueError, "not empty"),
        ({"name": " a"}, ValueError, "no space around it"),
        ({"name": 3}, TypeError, r"a string, got 3 \(int\)"),
        ({"name": "a/b"}, ValueError, r"'a/b'.*collide.*try 'a_b'"),
        ({"name": "a:mean"}, ValueError, "try 'a_mean'"),
        ({"name": "a\n"}, ValueError, "space around"),
        ({"name": "base_loss"}, ValueError, "means something else in the reports"),
        ({"weight": -0.5}, ValueError, r"'t'.*≥ 0, got -0.5; to reward.*negate"),
        ({"weight": float("nan")}, ValueError, "'t'.*finite.*nan"),
        ({"weight": np.inf}, ValueError, "'t'.*finite.*inf"),
        ({"weight": np.ones(2)}, ValueError, r"'t'.*scalar, got an array of shape \(2,\)"),
        ({"weight": "0.1"}, TypeError, "'t'.*real number.*'0.1'"),
        ({"weight": 1j}, TypeError, "'t'.*real number"),
        ({"weight": None}, TypeError, "'t'.*real number"),
        ({"weight": True}, TypeError, "'t'.*real number"),
        ({"weight": [0.1]}, TypeError, "'t'.*real number, a scalar array or a schedule"),
        ({"fn": 3}, TypeError, "'t'.*function of"),
        ({"fn": lambda x: x}, TypeError, "'t'.*called as.*signature"),
        ({"fn": lambda x, batch, coef: x}, TypeError, "'t'.*coef.*functools.partial"),
        ({"fn": lambda x, batch, *, coef: x}, TypeError, "'t'.*coef"),
        ({"fn": lambda x, batch, *, state: x}, TypeError, r"'t'.*init\(\)"),
        ({"on": "weights"}, ValueError, "'t'.*'outputs' or 'params'"),
    ],
)
def test_a_bad_spec(fields, error, message):
    with pytest.raises(error, match=message):
        spec(**fields)


def test_an_argument_bound_with_partial_is_fine():
    objective = jr.compose(base, [spec(fn=functools.partial(lambda x, b, c: c * jnp.sum(x), c=2.0))])
    assert float(objective(jnp.ones(2))[0]) == 6


class Unhashable:
    __hash__ = None

    def __call__(self, x, batch):
        return jnp.sum(x)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((None,), {}, TypeError, "needs a base loss"),
        (([spec()],), {}, TypeError, "needs a base loss first.*got list"),
        ((spec(),), {}, TypeError, "needs a base loss first.*got RegularizerSpec"),
        ((lambda x: x,), {}, TypeError, "base loss: fn is called as"),
        ((Unhashable(),), {}, TypeError, "base loss: fn must be hashable.*frozen dataclass"),
        ((base, [spec(), spec()]), {}, ValueError, "two terms are named 't'"),
        ((base, spec()), {}, TypeError, "into a list"),
        ((base, {"name": "t", "fn": base, "weight": 1.0}), {}, TypeError, "into a list"),
        ((base, [base]), {}, TypeError, "RegularizerSpec or a mapping"),
        ((base, [{"name": "t", "fn": base}]), {}, ValueError, r"'t': missing \['weight'\]"),
        (
            (base, [{"name": "t", "fn": base, "wieght": 1}]),
            {},
            ValueError,
            r"missing \['weight'\]; unknown \['wieght'\]",
        ),
        ((base, [spec(on="params")]), {}, ValueError, "'t': on='params'.*forward=apply_fn"),
        ((base,), {"forward": 3}, TypeError, "forward is a function"),
        ((base,), {"track_grad_norms": "params"}, TypeError, "bool or a GradNorms"),
        ((base,), {"track_grad_norms": jr.GradNorms(wrt="params")}, ValueError, "give compose forward"),
        (
            (base,),
            {"track_grad_norms": jr.GradNorms(per_datum=True), "forward": base},
            ValueError,
            "wrt='outputs', per_datum=True",
        ),
    ],
)
def test_a_bad_objective(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        jr.compose(*arguments, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"wrt": "weights"}, "'outputs', 'params' or None"),
        ({"wrt": "params", "per_datum": True}, "belongs to no datum"),
        ({"wrt": "outputs", "params": "head"}, "needs wrt='params'"),
    ],
)
def test_bad_grad_norms(keywords, message):
    with pytest.raises(ValueError, match=message):
        jr.GradNorms(**keywords)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda x, b: x, ValueError, r"a term's value is a scalar, got shape \(3,\); reduce it"),
        (lambda x, b: jnp.sum(x > 0), TypeError, "dtype int32, which has no gradient"),
        (lambda x, b: jnp.sum(x) * 1j, TypeError, "dtype complex64"),
        (lambda x, b: None, TypeError, "is a return missing"),
        (lambda x, b: "1", TypeError, r"returns value or \(value, metrics\), got str"),
        (lambda x, b: (jnp.sum(x), {}, {}), TypeError, "a tuple of 3"),
        (lambda x, b: (jnp.sum(x), [1]), TypeError, "metrics are a mapping.*got list"),
        (lambda x, b: (jnp.sum(x), {"m": x}), ValueError, r"metric 'm' is a scalar, got shape \(3,\)"),
        (lambda x, b: (jnp.sum(x), {"m": "a"}), TypeError, "metric 'm' is a scalar, got str"),
        (lambda x, b: (jnp.sum(x), {"m": 1j}), TypeError, "metric 'm' is a real number"),
        (lambda x, b: (jnp.sum(x), {3: 1.0}), TypeError, "metric's name"),
        (lambda x, b: (jnp.sum(x), {"value": 1.0}), ValueError, "'value' would collide"),
    ],
)
@pytest.mark.parametrize("role", ["base", "term"])
def test_a_bad_term_when_first_traced(fn, error, message, role):
    if role == "base":
        objective, who = jr.compose(fn), "base loss"
    else:
        objective, who = jr.compose(base, [spec(fn=fn)]), "term 't'"
    for call in (objective, objective.value_and_grad, jax.jit(objective)):
        with pytest.raises(error, match=f"{who}: .*{message}"):
            call(jnp.ones(3))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"w": jnp.ones(2), "n": jnp.arange(2)}, TypeError, "at 'n', has dtype int32.*nnx.split"),
        ({"w": jnp.ones(2), "c": jnp.ones(2) > 0}, TypeError, "at 'c', has dtype bool"),
        (jnp.arange(3), TypeError, "x has dtype int32"),
        ({}, ValueError, "no array in it"),
    ],
)
@pytest.mark.parametrize("track", [False, True])
def test_what_cannot_be_differentiated(x, error, message, track):
    objective = jr.compose(
        lambda x, b: sum(jnp.sum(jnp.real(leaf)) for leaf in jax.tree.leaves(x)),
        track_grad_norms=track,
    )
    for call in (objective, objective.value_and_grad):
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.parametrize("track", [False, True, jr.GradNorms(wrt="outputs")])
def test_integer_outputs(track):
    objective = jr.compose(
        lambda z, b: jnp.sum(z["a"]),
        forward=lambda p, b: {"a": p, "ids": jnp.arange(3)},
        track_grad_norms=track,
    )
    with pytest.raises(TypeError, match="what forward returns, at 'ids', has dtype int32"):
        objective.value_and_grad(jnp.ones(3))


def test_a_filter_that_matches_nothing_lists_the_paths():
    objective = jr.compose(
        lambda z, b: jnp.sum(z),
        forward=lambda p, b: p["head"],
        track_grad_norms=jr.GradNorms(params="haed"),
    )
    with pytest.raises(ValueError, match="'haed' matches none of the paths:\n  head"):
        objective.value_and_grad({"head": jnp.ones(2)})


def test_unknown_names_suggest_the_nearest():
    objective = jr.compose(base, [spec(name="l1_sparsity")])
    with pytest.raises(KeyError, match="did you mean 'l1_sparsity'"):
        objective.with_weights({"l1_sparsty": 1.0})
    with pytest.raises(KeyError, match="no term is named 'q'; the terms are"):
        objective.only("q")
    with pytest.raises(KeyError, match="no term is named"):
        objective.without("q")
    with pytest.raises(ValueError, match="'l1_sparsity'.*≥ 0"):
        objective.with_weights({"l1_sparsity": -1.0})
    with pytest.raises(TypeError, match="'l1_sparsity'.*with_weights takes numbers"):
        objective.with_weights({"l1_sparsity": optax.constant_schedule(1.0)})


def test_missing_state_and_key():
    scheduled = jr.compose(base, [spec(weight=optax.constant_schedule(0.5))])
    with pytest.raises(ValueError, match=r"'t': its weight is a schedule.*state=objective.init\(\)"):
        scheduled.value_and_grad(jnp.ones(3))
    random = jr.compose(base, [spec(fn=lambda x, b, *, key: jnp.sum(x))])
    with pytest.raises(ValueError, match=r"'t'.*pass key=jax.random.key\(seed\)"):
        random(jnp.ones(3))


def test_a_schedule_that_is_no_scalar():
    objective = jr.compose(base, [spec(weight=lambda step: jnp.ones(2))])
    with pytest.raises(ValueError, match=r"'t': its schedule gives shape \(2,\)"):
        objective(jnp.ones(3), state=objective.init())


DATUM = {"logprobs": [-1.0, -2.0], "ref": [-1.0, -2.0]}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "no data"),
        (DATUM, TypeError, "a sequence of datums, got dict"),
        ([3], TypeError, "datum 0: expected a mapping.*got int"),
        ([DATUM, {}], ValueError, "datum 1 has no arrays"),
        ([DATUM, {"logprobs": [-1.0]}], ValueError, "datum 1 has no 'ref', which datum 0 has"),
        ([{"logprobs": [-1.0]}, DATUM], ValueError, "datum 0 has no 'ref', which datum 1 has"),
        (
            [{"logprobs": [-1.0, -2.0], "ref": [-1.0]}],
            ValueError,
            "datum 0: its arrays differ in length: {'logprobs': 2, 'ref': 1}",
        ),
        ([DATUM, {**DATUM, "ref": [-1.0, np.nan]}], ValueError, r"datum 1, 'ref': NaN at \[1\]"),
        ([{**DATUM, "reward": np.nan}], ValueError, "datum 0, 'reward': NaN at its only value"),
        ([{**DATUM, "ref": ["a", "b"]}], TypeError, "datum 0, 'ref': not an array of real numbers"),
        ([{**DATUM, "ref": [1j, 2j]}], TypeError, "datum 0, 'ref': not an array of real numbers"),
        ([{**DATUM, "ref": [[1], [2, 3]]}], TypeError, "datum 0, 'ref': not an array of numbers"),
        ([{"ref": np.zeros((2, 2, 2))}], ValueError, r"datum 0, 'ref': has shape \(2, 2, 2\)"),
        (
            [{"k": np.zeros((2, 3))}, {"k": np.zeros((2, 4))}],
            ValueError,
            r"datum 1, 'k': has shape \(2, 4\) where datum 0 has \(2, 3\)",
        ),
        ([{**DATUM, "ref_logprobs": [-1.0, 0.9]}], ValueError, "datum 0, 'ref_logprobs': logprobs are ≤ 0"),
        ([{"reward": 1.0}], ValueError, "datum 0 has scalars only"),
        ([{"logprobs": []}], ValueError, "datum 0 has no tokens"),
        ([{"ids": [2**40]}], ValueError, "datum 0, 'ids': holds integers outside of int32"),
        ([{1: [1.0]}], TypeError, "datum 0: a key is a string, got 1"),
        ([{**DATUM, "weights": 1.0}], ValueError, "'weights' has one number a token"),
        ([{**DATUM, "mask": 1}], ValueError, "'mask' has one truth value a token"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        jr.TokenBatch.pack(data)


def test_other_bad_use_of_a_batch():
    batch = jr.TokenBatch.pack([DATUM], length_buckets=[4], row_buckets=[2])
    with pytest.raises(KeyError, match=r"no array 'reff'; it has \['logprobs', 'ref'\]"):
        batch["reff"]
    with pytest.raises(ValueError, match=r"\(B, T\) = \(2, 4\).*got \(3, 4\)"):
        batch.mean(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="unpack takes"):
        batch.unpack(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="2 does not fit into the largest length bucket, 1"):
        jr.TokenBatch.pack([DATUM], length_buckets=[1])
    with pytest.raises(ValueError, match="all arrays are"):
        jr.TokenBatch.from_arrays(a=jnp.zeros((2, 3)), b=jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.losses.CrossEntropy(inputs="logit"), "'logprobs', 'logits'; got 'logit'"),
        (lambda: jr.losses.CrossEntropy(reduction="mean"), "'token_mean', 'token_sum', 'datum_mean'"),
        (lambda: jr.regularizers.Entropy(mode="max"), "'minimize', 'maximize'"),
        (lambda: jr.regularizers.Entropy(temperature=0.0), "temperature is positive"),
        (lambda: jr.regularizers.KL(estimator="k4"), "'k1', 'k2', 'k3'"),
        (lambda: jr.regularizers.KL(direction="back"), "'forward', 'reverse'"),
        (lambda: jr.regularizers.L2(clip=0.0), "clip is a positive number"),
        (lambda: jr.regularizers.L2(center="median"), "'mean'; got 'median'"),
        (lambda: jr.regularizers.L1(strength=-1.0), "strength is a finite number"),
    ],
)
def test_bad_arguments_of_terms(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "x", "batch", "error", "message"),
    [
        (
            jr.regularizers.KL(),
            (2, 3),
            {"ref": (2, 3)},
            KeyError,
            r"no array 'ref_logprobs' \(the reference\); it has \['ref'\]",
        ),
        (
            jr.regularizers.KL(reference="ref"),
            (2, 3),
            {"ref": (2, 3, 4)},
            ValueError,
            r"\(2, 3, 4\).*\(2, 3\)",
        ),
        (
            jr.regularizers.ZLoss(),
            (2, 3),
            {"weights": (2, 3)},
            ValueError,
            r"weights has shape \(2, 3\), but x, logits \[..., V\], has \(2, 3\)",
        ),
        (jr.regularizers.Entropy(normalize=True), (2, 3), {}, ValueError, "need whole distributions"),
        (jr.losses.CrossEntropy(), (2, 3, 4), {}, ValueError, "inputs='logits' if x holds logits"),
        (jr.losses.CrossEntropy(inputs="logits"), (2, 3, 4), {}, KeyError, "no target tokens"),
        (jr.regularizers.L1(), (3,), {}, ValueError, r"\[B, T, ...\], got \(3,\)"),
        (jr.regularizers.L2SP(reference={"a": 1.0}), (2,), {}, ValueError, "did the spec forget on='params'"),
    ],
)
def test_shapes_that_do_not_fit_a_term(term, x, batch, error, message):
    arrays = {name: jnp.zeros(shape) for name, shape in batch.items()}
    with pytest.raises(error, match=message):
        term(jnp.zeros(x), arrays)


def test_probabilities_are_not_taken_for_logprobs():
    x = jnp.array([[0.5, 0.9], [0.5, 0.9]])
    batch = {"logprobs": -x, "advantages": x, "ref_logprobs": -x}
    for term in (jr.losses.CrossEntropy(), jr.losses.PPO(), jr.regularizers.Focal(), jr.losses.DPO()):
        with pytest.raises(ValueError, match="logprobs are ≤ 0, but x holds 0.9.*take their logarithm"):
            term(x, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.losses.PPO(low=1.3), "clip range"),
        (lambda: jr.losses.CISPO(high=0.5), "clip range"),
        (lambda: jr.losses.DRO(beta=-1.0), "beta is a finite number"),
        (lambda: jr.losses.DPO(beta=0.0), "beta is a positive number"),
        (lambda: jr.losses.SimPO(gamma=np.inf), "gamma is a finite number"),
        (lambda: jr.regularizers.ElasticNet(alpha=2.0), "alpha is within"),
        (lambda: jr.regularizers.Focal(gamma=0.5), "gamma is ≥ 1"),
        (lambda: jr.regularizers.Orthogonality(mode="hrad"), "'soft', 'hard', 'spectral'"),
        (lambda: jr.regularizers.Consistency(metric="mae"), "'mse', 'l1', 'cosine', 'kl'"),
        (lambda: jr.regularizers.Length(target=0.0), "target is a positive number"),
        (lambda: jr.regularizers.Repetition(window=0), "window is a whole number"),
        (lambda: jr.losses.DPO()(-jnp.ones((3, 2)), {}), "their number is even; got 3 rows"),
        (lambda: jr.losses.PPO()(-jnp.ones((2, 3, 4)), {}), r"logprobs \[B, T\], got shape \(2, 3, 4\)"),
        (
            lambda: jr.regularizers.JS()(-jnp.ones((2, 3)), jr.TokenBatch.from_arrays(mask=jnp.ones((2, 3)))),
            r"x is logits \[B, T, V\] with .* got \(2, 3\)",
        ),
        (
            lambda: jr.regularizers.WeightL1(params="haed")({"head": jnp.ones(2)}, None),
            "'haed' matches none of the paths:\n  head",
        ),
        (lambda: jr.regularizers.NuclearNorm()({"b": jnp.ones(2)}, None), r"two axes or more:\n  b: \(2,\)"),
    ],
)
def test_bad_arguments_of_the_library(make, message):
    with pytest.raises(ValueError, match=message):
        make()
