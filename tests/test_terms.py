"""The built-in terms against NumPy and SciPy in float64: value, and gradient by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

scipy = pytest.importorskip("scipy")
pytest.importorskip("scipy.special")
pytest.importorskip("scipy.stats")

B, T, V = 3, 4, 7
MASK = np.arange(T) < np.array([4, 2, 0])[:, None]
REDUCTIONS = ["token_mean", "token_sum", "datum_mean"]


def reduced(values, how, mask=MASK):
    per_token = values.reshape(*values.shape[:2], -1).mean(-1)
    if how == "token_sum":
        return (values * mask.reshape(*mask.shape, *[1] * (values.ndim - 2))).sum()
    if how == "token_mean":
        return per_token[mask].mean()
    return np.mean([row[m].mean() for row, m in zip(per_token, mask, strict=True) if m.any()])


@pytest.fixture
def data(rng):
    return {
        "lp": -rng.uniform(0.1, 3, (B, T)),
        "ref": -rng.uniform(0.1, 3, (B, T)),
        "logits": rng.normal(size=(B, T, V)),
        "ref_logits": rng.normal(size=(B, T, V)),
        "targets": rng.integers(0, V, (B, T)),
    }


def entropy(z):
    return scipy.stats.entropy(scipy.special.softmax(z, -1), axis=-1)


def kl(p, q):
    return scipy.stats.entropy(scipy.special.softmax(p, -1), scipy.special.softmax(q, -1), axis=-1)


R = jr.regularizers
CASES = {
    "CrossEntropy": (lambda r: jr.losses.CrossEntropy(reduction=r), "lp", lambda d: -d["lp"]),
    "CrossEntropy of logits": (
        lambda r: jr.losses.CrossEntropy(inputs="logits", targets="targets", reduction=r),
        "logits",
        lambda d: (
            -np.take_along_axis(scipy.special.log_softmax(d["logits"], -1), d["targets"][..., None], -1)[
                ..., 0
            ]
        ),
    ),
    "Entropy": (lambda r: R.Entropy(reduction=r), "logits", lambda d: entropy(d["logits"])),
    "Entropy, maximize": (
        lambda r: R.Entropy(mode="maximize", reduction=r),
        "logits",
        lambda d: -entropy(d["logits"]),
    ),
    "Entropy, temperature": (
        lambda r: R.Entropy(temperature=2.5, normalize=True, reduction=r),
        "logits",
        lambda d: entropy(d["logits"] / 2.5) / np.log(V),
    ),
    "Entropy, sampled": (lambda r: R.Entropy(reduction=r), "lp", lambda d: -d["lp"]),
    "KL, forward": (lambda r: R.KL("ref_logits"), "logits", None),
    "L1": (lambda r: R.L1(reduction=r), "logits", lambda d: np.abs(d["logits"])),
    "L1 of probs": (lambda r: R.L1(of="probs", reduction=r), "lp", lambda d: np.exp(d["lp"])),
    "L2": (lambda r: R.L2(reduction=r), "logits", lambda d: d["logits"] ** 2),
    "L2, mean": (
        lambda r: R.L2(center="mean", clip=0.5, reduction=r),
        "lp",
        lambda d: np.clip(d["lp"] - d["lp"][MASK].mean(), -0.5, 0.5) ** 2,
    ),
    "L2, number": (lambda r: R.L2(center=-1.0, reduction=r), "lp", lambda d: (d["lp"] + 1) ** 2),
    "ZLoss": (
        lambda r: R.ZLoss(reduction=r),
        "logits",
        lambda d: scipy.special.logsumexp(d["logits"], -1) ** 2,
    ),
}
CASES |= {
    f"KL, {name}": (
        lambda r, kw=kw: R.KL(reference="ref_logits", reduction=r, **kw),
        "logits",
        lambda d, f=f: f(d["logits"], d["ref_logits"]),
    )
    for name, kw, f in [
        ("forward", {}, kl),
        ("reverse", {"direction": "reverse"}, lambda p, q: kl(q, p)),
        ("symmetric", {"symmetric": True}, lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    ]
}
CASES |= {
    f"KL, {k}": (
        lambda r, k=k: R.KL(reference="ref", estimator=k, reduction=r),
        "lp",
        lambda d, f=f: f(d["ref"] - d["lp"]),
    )
    for k, f in [("k1", lambda d: -d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: np.exp(d) - d - 1)]
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", sorted(CASES))
def test_value_and_gradient(case, reduction, data, x64):
    make, x_name, oracle = CASES[case]
    term = make(reduction)
    assert term == make(reduction)
    assert hash(term) == hash(make(reduction))
    batch = jr.TokenBatch.from_arrays(mask=MASK, **{k: v for k, v in data.items() if k != x_name})

    def numpy_value(x):
        return reduced(oracle(data | {x_name: x}), reduction)

    x = data[x_name]
    (value, metrics), grad = jax.value_and_grad(lambda x: term(x, batch), has_aux=True)(jnp.asarray(x))
    close(value, numpy_value(x), rtol=1e-10, atol=1e-12)
    assert all(np.isfinite(m) for m in metrics.values())
    # Central differences with a step of 1e-6: truncation 1e-12, rounding 1e-10.
    for index in [*np.ndindex(x.shape)][:: max(1, x.size // 25)]:
        step = np.zeros_like(x)
        step[index] = 1e-6
        close(grad[index], (numpy_value(x + step) - numpy_value(x - step)) / 2e-6, rtol=1e-6, atol=1e-8)
    assert not np.asarray(grad)[~MASK].any()


@pytest.mark.parametrize("where", ["masked", "real"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_minus_infinity_never_makes_a_nan(case, where, data):
    make, x_name, _ = CASES[case]
    x = data[x_name].astype(np.float32)
    index = (1, 3) if where == "masked" else (0, 1)
    entry = (*index, 2) if x.ndim == 3 else index
    x[entry] = -np.inf
    batch = jr.TokenBatch.from_arrays(mask=MASK, **{k: v for k, v in data.items() if k != x_name})
    (value, metrics), grad = jax.value_and_grad(lambda x: make("token_mean")(x, batch), has_aux=True)(x)
    assert not np.isnan(value)
    assert not np.isnan(np.asarray(grad)).any()
    assert not any(np.isnan(m) for m in metrics.values())
    if where == "masked":
        assert np.isfinite(value)


@pytest.mark.parametrize(
    "case", ["KL, k1", "KL, k2", "KL, k3", "KL, forward", "KL, reverse", "KL, symmetric"]
)
def test_minus_infinity_in_the_reference(case, data):
    make, x_name, _ = CASES[case]
    reference = "ref" if x_name == "lp" else "ref_logits"
    other = data[reference].astype(np.float32)
    other[(0, 1) if other.ndim == 2 else (0, 1, 2)] = -np.inf
    batch = jr.TokenBatch.from_arrays(mask=MASK, **{reference: other})
    for x in (data[x_name].astype(np.float32), other):
        (value, _), grad = jax.value_and_grad(lambda x: make("token_mean")(x, batch), has_aux=True)(x)
        assert not np.isnan(value)
        assert np.isfinite(np.asarray(grad)).all()
    assert float(value) == pytest.approx(0, abs=1e-6)  # equal to itself, impossible tokens included


@pytest.mark.parametrize("case", sorted(CASES))
def test_bfloat16_and_empty_masks(case, data):
    make, x_name, _ = CASES[case]
    x = jnp.asarray(data[x_name], jnp.bfloat16)
    batch = jr.TokenBatch.from_arrays(mask=MASK, **{k: v for k, v in data.items() if k != x_name})
    value, _ = make("token_mean")(x, batch)
    assert value.dtype == jnp.float32
    empty = batch.replace(mask=np.zeros_like(MASK), weights=np.zeros(MASK.shape, np.float32))
    (value, _), grad = jax.value_and_grad(lambda x: make("token_mean")(x, empty), has_aux=True)(x)
    assert float(value) == 0
    assert not np.asarray(grad, np.float32).any()


def test_cross_entropy_of_several_targets_a_token(rng):
    lp, w = -rng.uniform(0.1, 3, (2, 5, 3)), rng.uniform(size=(2, 5, 3))
    batch = jr.TokenBatch.from_arrays(weights=w.astype(np.float32))
    close(jr.losses.CrossEntropy()(jnp.asarray(lp, jnp.float32), batch)[0], -(w * lp).sum())


def test_a_target_outside_of_the_vocabulary_is_loud_and_a_masked_one_is_not(data):
    term = jr.losses.CrossEntropy(inputs="logits", targets="targets", reduction="token_mean")
    logits = jnp.asarray(data["logits"], jnp.float32)
    for at, loud in (((0, 0), True), ((2, 0), False)):
        for bad in (-100, V):
            targets = data["targets"].copy()
            targets[at] = bad
            value, _ = term(logits, jr.TokenBatch.from_arrays(mask=MASK, targets=targets))
            assert bool(np.isnan(value)) == loud


def test_l2_sp(rng):
    start = {"head": {"w": rng.normal(size=(2, 3))}, "b": rng.normal(size=3)}
    here = jax.tree.map(lambda a: a + rng.normal(size=a.shape), start)
    value, metrics = jr.regularizers.L2SP(start)(here, None)
    want = sum(
        ((a - b) ** 2).sum() for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(start), strict=True)
    )
    close(value, want)
    close(metrics["distance"], np.sqrt(want))
    value, _ = jr.regularizers.L2SP(start, params="head")(here, None)
    close(value, ((here["head"]["w"] - start["head"]["w"]) ** 2).sum())
    with pytest.raises(ValueError, match="matches none of the paths:\n  b\n  head/w"):
        jr.regularizers.L2SP(start, params="tail")(here, None)
