"""Terms on whole distributions: of any leading axes, of padded vocabularies, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, graded

import jaxreg as jr

special = pytest.importorskip("scipy.special")
stats = pytest.importorskip("scipy.stats")
L, R = jr.losses, jr.regularizers
B, V = 6, 5
RNG = np.random.default_rng(0)
X, REF, LABELS = RNG.normal(size=(B, V)), RNG.normal(size=(B, V)), RNG.integers(0, V, B)
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 1.0])
P, Q = special.softmax(X, -1), special.softmax(REF, -1)
LP = special.log_softmax(X, -1)
LABELLED = LP[np.arange(B), LABELS]
TERMS = {
    "Entropy": (R.Entropy(inputs="logits"), stats.entropy(P, axis=-1)),
    "Entropy, T": (
        R.Entropy(inputs="logits", temperature=2.0),
        stats.entropy(special.softmax(X / 2, -1), axis=-1),
    ),
    "KL": (R.KL(inputs="logits", reference="ref"), stats.entropy(P, Q, axis=-1)),
    "JS": (
        R.JS(reference="ref"),
        (stats.entropy(P, (P + Q) / 2, axis=-1) + stats.entropy(Q, (P + Q) / 2, axis=-1)) / 2,
    ),
    "ConfidencePenalty": (R.ConfidencePenalty(), -stats.entropy(P, axis=-1)),
    "LabelSmoothing": (R.LabelSmoothing(), -LP.mean(-1)),
    "ZLoss": (R.ZLoss(), special.logsumexp(X, -1) ** 2),
    "CrossEntropy": (
        L.CrossEntropy(inputs="logits", targets="labels", reduction="token_mean"),
        -LABELLED,
    ),
    "Focal": (R.Focal(inputs="logits", targets="labels"), -((1 - np.exp(LABELLED)) ** 2) * LABELLED),
    "KL, sampled": (
        R.KL(inputs="logits", reference="ref_lp", targets="labels", estimator="k2"),
        (LABELLED + 1) ** 2 / 2,
    ),
    "LogRatioL2": (R.LogRatioL2(inputs="logits", reference="ref_lp", targets="labels"), (LABELLED + 1) ** 2),
}
AXES = {"[B, V]": (B,), "[B, T, V]": (2, 3), "[B, T, S, V]": (1, 2, 3), "[V]": ()}


def arranged(lead):
    """x and the arrays, of these leading axes."""
    n = int(np.prod(lead))
    arrays = {"ref": REF, "labels": LABELS, "weights": WEIGHTS, "ref_lp": np.full(B, -1.0)}
    return X[:n].reshape(*lead, V), {
        k: jnp.asarray(a[:n].reshape((*lead, *a.shape[1:])), None if k == "labels" else jnp.float32)
        for k, a in arrays.items()
    }


@pytest.mark.parametrize("lead", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", TERMS)
def test_of_any_leading_axes_it_is_the_formula(name, lead):
    term, values = TERMS[name]
    x, arrays = arranged(lead)
    n = int(np.prod(lead))
    want = np.average(values[:n], weights=WEIGHTS[:n])
    x = jnp.asarray(x, jnp.float32)
    (value, _), slope = graded(term, x, arrays)
    close(value, want, rtol=1e-5)
    assert np.isfinite(slope).all()
    if lead == (B,):
        assert not np.asarray(slope)[2].any()  # of weight 0
        (_, out), same = jr.compose(term, track_grad_norms=True).value_and_grad(x, arrays)
        close(same, slope)
        close(out.base_loss.grad_norm, np.linalg.norm(slope))
        unweighted = {k: a for k, a in arrays.items() if k != "weights"}
        mapped = jax.jit(jax.vmap(lambda x, b: term(x, b)[0]))(x, unweighted)
        close(mapped, values, rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16(name):
    term, values = TERMS[name]
    x, arrays = arranged((B,))
    value, _ = term(jnp.asarray(x, jnp.bfloat16), arrays)
    assert value.dtype == jnp.float32
    close(value, np.average(values, weights=WEIGHTS), rtol=0.05)


def test_logits_of_a_classifier_are_not_read_as_logprobs():
    x, arrays = jnp.asarray(X, jnp.float32), {"ref_logprobs": jnp.asarray(REF, jnp.float32)}
    terms = [R.Entropy(), R.KL(), L.CrossEntropy(), R.LogRatioL2(), R.Focal(), R.Unlikelihood()]
    for term in terms:
        with pytest.raises(ValueError, match=f"{type(term).__name__}: .*logprobs are ≤ 0.*inputs='logits'"):
            term(x, arrays)
        value, _ = jax.jit(lambda x, term=term: term(x, arrays))(x)  # where nobody can be told
        assert np.isnan(value)
    labelled = {"labels": jnp.asarray(LABELS), **arrays}
    for term in terms:
        with pytest.raises(ValueError, match=f"{type(term).__name__}.*'labels' .* say inputs='logits'"):
            jax.jit(lambda x, term=term: term(x, labelled))(x)
    with pytest.raises(ValueError, match="KL: .* say inputs='logits'"):
        R.KL()(x[0], {"ref_logprobs": arrays["ref_logprobs"][0]})


def test_a_token_batch_keeps_its_meaning():
    batch = jr.TokenBatch.from_arrays(mask=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"ConfidencePenalty: x is logits \[B, T, V\] with .*\(2, 4\)"):
        R.ConfidencePenalty()(-jnp.ones((2, 4)), batch)
    close(R.Entropy()(-jnp.ones((2, 4)), batch)[0], 1.0)


PADDING = [-np.inf, -1e9, float(np.finfo(np.float32).min), -1e4]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_words_that_cannot_be_change_nothing(padding, dtype):
    x = jnp.asarray(RNG.normal(size=(2, 3, 4)), dtype)
    padded = jnp.concatenate([x, jnp.full((2, 3, 3), padding, dtype)], -1)
    ref = jnp.asarray(RNG.normal(size=(2, 3, 4)), dtype)
    padded_ref = jnp.concatenate([ref, jnp.full((2, 3, 3), padding, dtype)], -1)
    for make in (
        lambda r: R.LabelSmoothing(),
        lambda r: R.Entropy(normalize=True),
        lambda r: R.Entropy(normalize=True, temperature=2.0),
        lambda r: R.ConfidencePenalty(),
        lambda r: R.ZLoss(),
        lambda r: R.KL(reference=r),
        lambda r: R.KL(reference=r, symmetric=True),
        lambda r: R.JS(reference=r),
    ):
        (value, _), slope = graded(make(ref), x, {})
        (padded_value, _), padded_slope = graded(make(padded_ref), padded, {})
        close(padded_value, value, rtol=1e-5)
        close(padded_slope[..., :4], slope, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4)
        assert not np.asarray(padded_slope[..., 4:], np.float32).any()


def test_a_uniform_choice_among_the_possible_has_normalized_entropy_1():
    x = jnp.array([[[0.0] * 4 + [-1e9] * 12]])
    close(R.Entropy(normalize=True)(x, {})[0], 1.0)
    only = jnp.array([[[0.0] + [-jnp.inf] * 3]])
    close(R.Entropy(normalize=True)(only, {})[0], 0.0)


OF_TARGETS = [
    L.CrossEntropy(inputs="logits"),
    L.ImportanceSampling(inputs="logits"),
    L.PPO(inputs="logits"),
    L.CISPO(inputs="logits"),
    L.DRO(inputs="logits"),
    L.GSPO(inputs="logits"),
    L.DPO(inputs="logits", reference="logprobs"),
    L.SimPO(inputs="logits"),
    R.Repetition(),
    R.KL(inputs="logits", reference="logprobs"),
    R.LogRatioL2(inputs="logits", reference="logprobs"),
    R.Focal(inputs="logits"),
    R.Unlikelihood(inputs="logits"),
]


@pytest.mark.parametrize("wrong", [-100, -1, 5, 2**20])
@pytest.mark.parametrize("term", OF_TARGETS, ids=lambda t: type(t).__name__)
def test_targets_that_are_no_words(term, wrong):
    x = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    arrays = {"logprobs": -jnp.ones((2, 3)), "advantages": jnp.ones((2, 3))}
    targets = jnp.array([[1, wrong, 2], [1, 1, 0]])
    counted = jr.TokenBatch.from_arrays(target_tokens=targets, **arrays)
    with pytest.raises(ValueError, match=f"{type(term).__name__}: 'target_tokens' holds {wrong} .* weight 0"):
        term(x, counted)
    with pytest.raises(ValueError, match="holds"):  # of concrete targets, though x be traced
        jax.grad(lambda x: term(x, counted)[0])(x)
    (_, out), _ = jr.compose(term).value_and_grad(x, counted)
    assert out.to_dict()["nonfinite"] == ["base_loss"]
    for given in (
        {"weights": jnp.array([[1.0, 0, 1], [1, 1, 1]])},
        {"mask": jnp.array([[1, 0, 1], [1, 1, 1]], bool)},
    ):
        left_out = jr.TokenBatch.from_arrays(target_tokens=targets, **arrays, **given)
        value, slope = jax.value_and_grad(lambda x, b=left_out: term(x, b)[0])(x)
        assert np.isfinite(value)
        assert not np.asarray(slope)[0, 1].any()


def test_weights_of_k_targets_beside_a_term_a_token():
    weights = jnp.asarray(RNG.uniform(size=(2, 3, 4)), jnp.float32)
    x = jnp.log(jnp.full((2, 3, 4), 0.2))
    batch = jr.TokenBatch.from_arrays(weights=weights, teacher_logprobs=x, ref_logprobs=x, logprobs=x[..., 0])
    for term in (R.Entropy(), R.KL(), L.KLTopK(), R.LabelSmoothing(), L.PPO(advantages="logprobs")):
        name = type(term).__name__
        at = x[..., 0] if name == "PPO" else x
        with pytest.raises(ValueError, match=rf"{name}: .*weights are \[B, T, K\].*weights.sum\(-1\)"):
            term(at, batch)

        def summed(x, batch, term=term):
            return term(x, batch.replace(weights=batch.weights.sum(-1)))

        plain = batch.replace(weights=weights.sum(-1))
        close(summed(at, batch)[0], term(at, plain)[0])
        jr.compose(L.CrossEntropy(), [dict(name="t", fn=summed, weight=1.0)])
    elementwise = R.LogRatioL2(reference=jnp.zeros_like(x), reduction="token_sum")
    close(elementwise(x, batch)[0], np.log(0.2) ** 2 * np.asarray(weights).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"L1: its values are \(2, 3\)"):
        R.L1()(x[..., 0], batch)


def memory(fn, *shapes):
    """Bytes that the value and gradient of a function need besides its arguments, in arrays of the first."""
    at = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    compiled = jax.jit(jax.value_and_grad(fn, has_aux=True)).lower(*at).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * np.prod(shapes[0]))


def plain_kl(x, reference):
    log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(reference)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)), {}


def plain_js(x, reference):
    log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(reference)
    middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    halves = jnp.exp(log_p) * (log_p - middle) + jnp.exp(log_q) * (log_q - middle)
    return jnp.mean(0.5 * jnp.sum(halves, -1)), {}


@pytest.mark.parametrize(
    ("term", "plain"),
    [
        (lambda r: R.KL(reference=r), plain_kl),
        (lambda r: R.KL(reference=r, direction="reverse"), plain_kl),
        (lambda r: R.JS(reference=r), plain_js),
        (lambda r: L.ReverseKLTopK(reference=r), plain_kl),
        (lambda r: L.KLTopK(reference=r), plain_kl),
    ],
)
def test_it_holds_no_more_than_the_term_by_hand(term, plain):
    shapes = [(8, 16, 1024)] * 2
    ours = memory(lambda x, r: term(r)(x, {}), *shapes)
    assert ours <= memory(plain, *shapes) + 0.05


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric", "js"])
def test_divergences_differentiate_twice_and_forwards(kind, x64):
    x, r = (jnp.asarray(RNG.normal(size=(1, 2, 4))) for _ in range(2))
    term = (
        R.JS(reference=r)
        if kind == "js"
        else R.KL(
            reference=r, direction=kind if kind == "reverse" else "forward", symmetric=kind == "symmetric"
        )
    )

    def f(x):
        return term(x, {})[0]

    def by_hand(x):
        log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(r)
        middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
        kl = lambda a, b: jnp.mean(jnp.sum(jnp.exp(a) * (a - b), -1))
        return {
            "forward": kl(log_p, log_q),
            "reverse": kl(log_q, log_p),
            "symmetric": (kl(log_p, log_q) + kl(log_q, log_p)) / 2,
            "js": (kl(log_p, middle) + kl(log_q, middle)) / 2,
        }[kind]

    close(jax.jit(jax.jacfwd(f))(x), jax.jit(jax.grad(by_hand))(x), rtol=1e-9, atol=1e-12)
    close(jax.jit(jax.hessian(f))(x), jax.jit(jax.hessian(by_hand))(x), rtol=1e-9, atol=1e-12)
