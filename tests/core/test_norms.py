"""Norms, against one gradient a term in float64, in every space and over random objectives."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, norm
from hypothesis import given, settings
from jax.test_util import check_grads

import jaxreg as jr

D, V, B, T = 6, 11, 4, 5


def model(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["body"]["w"] + params["body"]["b"][None, None])
    return hidden @ params["head"]["w"]


def cross_entropy(z, batch):
    logp = jax.nn.log_softmax(z)
    return -batch.mean(jnp.take_along_axis(logp, batch["target_tokens"][..., None], -1)[..., 0])


def decay(params, batch):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


OUTPUT_TERMS = {
    "entropy": jr.regularizers.Entropy(),
    "kl": jr.regularizers.KL(reference="ref"),
    "z": jr.regularizers.ZLoss(),
    "l2": jr.regularizers.L2(reduction="token_mean"),
}


def problem(seed, dtype=np.float32, **more):
    rng = np.random.default_rng(seed)
    params = {
        "body": {"w": rng.normal(size=(D, D)), "b": rng.normal(size=D)},
        "head": {"w": rng.normal(size=(D, V))},
    }
    lengths = rng.integers(1, T + 1, B)
    batch = jr.TokenBatch.from_arrays(
        mask=np.arange(T) < lengths[:, None],
        inputs=rng.normal(size=(B, T, D)).astype(dtype),
        ref=rng.normal(size=(B, T, V)).astype(dtype),
        target_tokens=rng.integers(0, V, (B, T)),
        **more,
    )
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params), batch


def compose(names, weights, track, with_decay):
    terms = [
        jr.RegularizerSpec(name=n, fn=OUTPUT_TERMS[n], weight=w) for n, w in zip(names, weights, strict=False)
    ]
    if with_decay:
        terms.append(jr.RegularizerSpec(name="decay", fn=decay, weight=0.01, on="params"))
    return jr.compose(cross_entropy, terms, forward=model, track_grad_norms=track)


def separate_gradients(seed, objective, space):
    """One jax.grad a term and their weighted sum, in float64."""
    with jax.enable_x64(True):
        params, batch = problem(seed, np.float64)
        outputs = model(params, batch)
        grads = {}
        for name in ("base_loss", *objective.names):
            fn = {"base_loss": cross_entropy, "decay": decay, **OUTPUT_TERMS}[name]

            def value(v, fn=fn, of_params=space == "params" and name != "decay"):
                result = fn(model(v, batch) if of_params else v, batch)
                return result[0] if isinstance(result, tuple) else result

            at = outputs if space == "outputs" and name != "decay" else params
            grads[name] = jax.device_get(jax.grad(value)(at))
    return grads


def total(grads, objective, names):
    weights = {"base_loss": 1.0} | {n: float(w) for n, w in objective.weights().items()}
    return jax.tree.map(lambda *g: sum(weights[n] * a for n, a in zip(names, g, strict=True)),
                        *(grads[n] for n in names))  # fmt: skip


objectives = st.tuples(
    st.integers(0, 10_000),
    st.lists(st.sampled_from(sorted(OUTPUT_TERMS)), unique=True, max_size=4),
    st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4),
    st.booleans(),
)


@settings(max_examples=20)
@given(objectives)
def test_norms_of_params_are_exact(case):
    seed, names, weights, with_decay = case
    objective = compose(names, weights, True, with_decay)
    grads = separate_gradients(seed, objective, "params")
    (_, out), got = objective.value_and_grad(*problem(seed))
    want = total(grads, objective, list(grads))
    close(out.base_loss.grad_norm, norm(grads["base_loss"]))
    close(out.total_grad_norm, norm(want))
    for name, term in out.regularizers.items():
        close(term.grad_norm, norm(grads[name]))
        close(term.grad_norm_weighted, float(term.weight) * norm(grads[name]))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


@settings(max_examples=20)
@given(objectives)
def test_norms_of_outputs_are_exact_and_the_gradient_is_the_params(case):
    seed, names, weights, with_decay = case
    objective = compose(names, weights, jr.GradNorms(wrt="outputs", per_datum=True), with_decay)
    grads = separate_gradients(seed, objective, "outputs")
    (_, out), got = objective.value_and_grad(*problem(seed))
    on_outputs = [n for n in grads if n != "decay"]
    close(out.total_grad_norm, norm(total(grads, objective, on_outputs)))
    for name in on_outputs:
        term = out.base_loss if name == "base_loss" else out.regularizers[name]
        close(term.grad_norm, norm(grads[name]))
        close(term.grad_norm_per_datum, np.sqrt((np.asarray(grads[name]) ** 2).sum((1, 2))))
    if with_decay:  # it has no outputs
        assert out.regularizers["decay"].grad_norm is None
        assert out.to_dict()["regularizers"]["decay"]["grad_norm"] is None
    params_grads = separate_gradients(seed, objective, "params")
    want = total(params_grads, objective, list(params_grads))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.parametrize("where", ["head", "*/w", ("head", "body/b"), lambda path: path.endswith("b")])
def test_a_filter_takes_the_norms_of_some_params_only(where):
    names = sorted(OUTPUT_TERMS)
    objective = compose(names, [0.1, 0.2, 0.3, 0.4], jr.GradNorms(params=where), True)
    grads = separate_gradients(3, objective, "params")
    (_, out), got = objective.value_and_grad(*problem(3))
    paths = {"body/b": ("body", "b"), "body/w": ("body", "w"), "head/w": ("head", "w")}
    chosen = {"head": ["head/w"], "*/w": ["body/w", "head/w"]}.get(
        where if isinstance(where, str) else "", ["body/b"]
    )
    if isinstance(where, tuple):
        chosen = ["head/w", "body/b"]
    for name, term in out.regularizers.items():
        close(term.grad_norm, norm([grads[name][a][b] for a, b in (paths[p] for p in chosen)]))
    want = total(grads, objective, list(grads))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    close(out.total_grad_norm, norm([want[a][b] for a, b in (paths[p] for p in chosen)]))


def flops(objective, *args):
    compiled = jax.jit(lambda o, *a: o.value_and_grad(*a)).lower(objective, *args).compile()
    return compiled.cost_analysis()["flops"]


def test_the_rest_of_a_filtered_pullback_is_never_computed():
    def deep(params, batch):
        h = batch["inputs"]
        for w in params["body"]:
            h = jnp.tanh(h @ w)
        return h @ params["head"]

    rng = np.random.default_rng(0)
    _, batch = problem(0)
    params = {
        "body": [jnp.asarray(rng.normal(size=(D, D)), jnp.float32) for _ in range(12)],
        "head": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    }
    terms = [jr.RegularizerSpec(name=n, fn=f, weight=0.1) for n, f in OUTPUT_TERMS.items()]

    def cost(track):
        return flops(jr.compose(cross_entropy, terms, forward=deep, track_grad_norms=track), params, batch)

    whole, head, none = cost(True), cost(jr.GradNorms(params="head")), cost(False)
    assert head < none + 0.3 * (whole - none)


SCALED = jr.compose(
    cross_entropy,
    [
        jr.RegularizerSpec(name="a", fn=lambda z, b: b.mean(z**2), weight=1.0),
        jr.RegularizerSpec(name="b", fn=lambda z, b: b["factor"][0] * b.mean(z**2), weight=1.0),
    ],
    forward=model,
    track_grad_norms=True,
)


@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_norms_scale_with_the_value(seed, factor):
    """‖∇(c·v)‖ = c·‖∇v‖, and the weighted norm follows the weight."""
    params, batch = problem(seed, factor=np.full(B, factor, np.float32))
    (_, out), _ = SCALED.with_weights({"a": factor}).value_and_grad(params, batch)
    a, b = out.regularizers.values()
    close(b.grad_norm, factor * a.grad_norm)
    close(a.grad_norm_weighted, b.grad_norm)


def test_norms_can_be_differentiated_at_zero():
    objective = jr.compose(lambda x, b: jnp.sum(x**2), track_grad_norms=True)
    grads = jax.grad(lambda x: objective.value_and_grad(x)[0][1].base_loss.grad_norm)(jnp.zeros(3))
    assert np.array_equal(grads, np.zeros(3))


def test_numerical_differences_agree(x64):
    params, batch = problem(1, np.float64)
    objective = compose(sorted(OUTPUT_TERMS), [0.1, 0.2, 0.3, 0.4], True, True)
    # The loss is smooth: a step of 1e-5 leaves a truncation error of 1e-10 and rounding of 1e-11.
    with pytest.warns(jr.NormsNotComputedWarning):
        check_grads(lambda p: objective(p, batch)[0], (params,), 1, ["rev"], 1e-7, 1e-7, 1e-5)


def test_norms_per_datum_need_rows():
    objective = jr.compose(lambda x, b: jnp.sum(x), track_grad_norms=jr.GradNorms(per_datum=True))
    with pytest.raises(ValueError, match="leading axis"):
        objective.value_and_grad(jnp.float32(1))
