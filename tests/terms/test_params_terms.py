"""Terms on parameters: any scale, layers stacked in one array, complex numbers, and where they live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, graded

import jaxreg as jr

R = jr.regularizers
SHAPE = (5, 4)


def matrix(seed=0, shape=SHAPE, complex_=False):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=shape)
    return real + 1j * rng.normal(size=shape) if complex_ else real


def gram(w, mode, axis):
    rows = w if axis == "rows" else w.T
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    away = unit @ unit.conj().T - np.eye(len(rows))
    if mode == "spectral":
        return np.abs(np.linalg.eigvalsh(away)).max()
    return (np.abs(away - np.diag(np.diag(away)) if mode == "soft" else away) ** 2).sum()


# Each with its degree and its value for one matrix in float64 (or complex128).
MATRICES = {
    "SpectralNorm": (lambda **k: R.SpectralNorm(iterations=300, **k), 1, lambda w: np.linalg.norm(w, 2)),
    "NuclearNorm": (lambda **k: R.NuclearNorm(**k), 1, lambda w: np.linalg.norm(w, "nuc")),
    "GroupLasso": (
        lambda **k: R.GroupLasso(**k),
        1,
        lambda w: np.sqrt(len(w)) * np.linalg.norm(w, axis=0).sum(),
    ),
    "GroupLasso, rows": (
        lambda **k: R.GroupLasso(groups="rows", **k),
        1,
        lambda w: np.sqrt(w.shape[1]) * np.linalg.norm(w, axis=1).sum(),
    ),
    "GroupLasso, leaves": (
        lambda **k: R.GroupLasso(groups="leaves", **k),
        1,
        lambda w: np.sqrt(w.size) * np.linalg.norm(w),
    ),
}
MATRICES |= {
    f"WeightOrthogonality, {mode}, {axis}": (
        lambda mode=mode, axis=axis, **k: R.WeightOrthogonality(mode=mode, axis=axis, **k),
        0,
        lambda w, mode=mode, axis=axis: gram(w, mode, axis),
    )
    for mode in ("soft", "hard", "spectral")
    for axis in ("rows", "columns")
}
ENTRIES = {
    "WeightL1": (lambda: R.WeightL1(), 1, lambda w: np.abs(w).sum()),
    "WeightL2": (lambda: R.WeightL2(), 2, lambda w: (np.abs(w) ** 2).sum()),
    "L2SP": (lambda: R.L2SP(reference={"w": jnp.zeros(SHAPE)}), 2, lambda w: (np.abs(w) ** 2).sum()),
    "EWC": (
        lambda: R.EWC(reference={"w": jnp.zeros(SHAPE)}, fisher={"w": 0.3 * jnp.ones(SHAPE)}),
        2,
        lambda w: (0.3 * np.abs(w) ** 2).sum(),
    ),
}
TERMS = MATRICES | ENTRIES
SCALES = [1e-18, 1e-9, 1e-4, 1.0, 1e6, 1e12, 1e18]


def slope(formula, w, direction):
    """Of the formula, along a direction, by central differences in float64."""
    return (formula(w + 1e-5 * direction) - formula(w - 1e-5 * direction)) / 2e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients_at_every_scale(name, scale):
    make, degree, formula = TERMS[name]
    term, w = make(), matrix()
    x = {"w": jnp.asarray(w * scale, jnp.float32)}
    (value, metrics), gradient = graded(term, x)
    close(float(value) / scale**degree, formula(w), rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(m) for m in metrics.values())
    direction = matrix(1)
    got = (np.asarray(gradient["w"], np.float64) / scale ** (degree - 1) * direction).sum()
    close(got, slope(formula, w, direction), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_of_mixed_scales_zero_and_the_limits(name):
    make, degree, formula = MATRICES[name]
    parts = {"a": 1e-18 * matrix(0), "b": 1e18 * matrix(1), "c": 1e-34 * matrix(2)}
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), parts)
    (value, _), gradient = graded(make(), x)
    close(float(value) / 1e18**degree, sum(formula(w) for w in parts.values()) / 1e18**degree)
    if degree == 1:  # the gradient does not depend on the scale
        for leaf, seed in (("a", 0), ("b", 1), ("c", 2)):
            want = slope(formula, matrix(seed), matrix(3))
            close((np.asarray(gradient[leaf], np.float64) * matrix(3)).sum(), want, rtol=1e-4, atol=1e-4)
    (value, _), gradient = graded(make(), {"w": jnp.zeros(SHAPE)})
    assert float(value) == 0.0
    assert not np.asarray(gradient["w"]).any()


def test_ewc_multiplies_in_an_order_that_fits():
    reference, fisher = {"w": jnp.zeros(2)}, {"w": jnp.array([1e-30, 1e30])}
    x = {"w": jnp.array([1e25, 1e-25])}
    (value, metrics), gradient = jax.value_and_grad(R.EWC(reference=reference, fisher=fisher), has_aux=True)(
        x, None
    )
    close(value / 1e20, 1.0)
    close(metrics["distance"] / 1e10, 1.0)
    close(gradient["w"], [2e-5, 2e5])


@pytest.mark.parametrize("name", MATRICES)
def test_a_stack_is_its_layers(name):
    make, _, formula = MATRICES[name]
    stack = np.stack([matrix(k) for k in range(3)])
    x = {"blocks": jnp.asarray(stack, jnp.float32), "head": jnp.asarray(matrix(9), jnp.float32)}
    want = sum(formula(w) for w in [*stack, matrix(9)])
    unstacked = {"head": x["head"]} | {f"block{k}": x["blocks"][k] for k in range(3)}
    (plain, plain_metrics), slopes = graded(make(), unstacked)
    for layers in ({"blocks": 1}, {"b*": 1, "*": 0}, (("blocks", 1),)):
        term = make(layers=layers)
        (value, metrics), gradient = graded(term, x)
        close(value, want)
        close(value, plain)
        close(gradient["head"], slopes["head"], atol=1e-5)
        close(gradient["blocks"], np.stack([slopes[f"block{k}"] for k in range(3)]), atol=1e-5)
        assert hash(term) == hash(make(layers=layers))
        assert dataclasses.replace(term) == term
    two = {"blocks": x["blocks"].reshape(1, 3, *SHAPE)}
    close(graded(make(layers=2), two)[0][0], sum(formula(w) for w in stack))
    for key, value in plain_metrics.items():
        close(metrics[key], value)


@pytest.mark.parametrize("name", MATRICES)
def test_kernels_of_more_axes_say_what_they_are(name):
    make, _, formula = MATRICES[name]
    kernel = matrix(0, (3, 2, 4, 5))
    x = {"conv": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    for ndim in (3, 4):
        few = {"conv": {"kernel": x["conv"]["kernel"].reshape((-1, 2, 4, 5)[-ndim:])}} if ndim == 4 else {
            "conv": {"kernel": x["conv"]["kernel"][0]}
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"'conv/kernel'.*\{'conv/kernel': 1\}.*\{'conv/kernel': 0\}"):
            make()(few, None)
    close(graded(make(layers=0), x)[0][0], formula(kernel.reshape(-1, 5)))
    close(graded(make(layers={"conv": 0}), x)[0][0], formula(kernel.reshape(-1, 5)))
    close(graded(make(layers=1), x)[0][0], sum(formula(k.reshape(-1, 5)) for k in kernel))


def test_layers_that_make_no_sense():
    x = {"w": jnp.ones((2, 3, 4)), "b": jnp.ones(3)}
    for bad in (-1, 1.5, True, "blocks", {"w": -1}, {"w": True}):
        with pytest.raises(ValueError, match="layers says how many leading axes"):
            R.SpectralNorm(layers=bad)
    with pytest.raises(ValueError, match="no path.*'x'|'x'"):
        R.SpectralNorm(layers={"x": 1})(x, None)
    with pytest.raises(ValueError, match="'w' has 4 axes of layers"):
        R.SpectralNorm(layers={"w": 4})(x, None)
    with pytest.raises(ValueError, match="two axes or more beside its layers"):
        R.SpectralNorm(layers=2)({"w": jnp.ones((2, 3, 4))}, None)
    for term in (R.WeightL1(), R.WeightL2(), R.L2SP(reference=x)):  # entries have no shape
        assert np.isfinite(term(x, None)[0])


def test_layers_of_a_scanned_flax_model():
    nnx = pytest.importorskip("flax.nnx")

    single = [nnx.Linear(4, 4, rngs=nnx.Rngs(k)) for k in range(3)]
    head = nnx.Linear(4, 5, rngs=nnx.Rngs(3))
    blocks = jax.tree.map(lambda *a: jnp.stack(a), *(nnx.state(m, nnx.Param) for m in single))
    state = {"blocks": blocks, "head": nnx.state(head, nnx.Param)}
    kernels = [np.asarray(m.kernel[...], np.float64) for m in [*single, head]]
    value, _ = R.NuclearNorm(layers={"blocks": 1})(state, None)
    close(value, sum(np.linalg.norm(k, "nuc") for k in kernels))


def outputs(params, batch):
    return 100.0 * params["w"] @ jnp.ones(SHAPE[1])


def of_params(params, batch):
    return 0.0 * jnp.sum(params["w"])


def zero(outputs, batch):
    return 0.0 * jnp.sum(outputs)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_on_parameters_lives_on_params(name):
    make, _, formula = TERMS[name]
    x = {"w": jnp.asarray(matrix(), jnp.float32)}
    want = formula(matrix())
    forms = [
        {"name": "t", "fn": make(), "weight": 1.0},
        {"name": "t", "fn": make(), "weight": 1.0, "on": "params"},
        jr.RegularizerSpec(name="t", fn=make(), weight=1.0),
    ]
    for track in (False, True, jr.GradNorms(wrt="outputs")):
        objectives = [jr.compose(zero, [spec], forward=outputs, track_grad_norms=track) for spec in forms]
        (loss, out), grads = objectives[0].value_and_grad(x)
        close(loss, want)
        for objective in objectives:
            assert "on params" in repr(objective)
            assert objective.plan is objectives[0].plan  # the same program
    assert out.regularizers["t"].grad_norm is None  # it has no outputs
    # Where x is the params already, there is nothing to say.
    plain = [jr.compose(of_params, [spec], track_grad_norms=True) for spec in forms]
    (loss, out), _ = plain[0].value_and_grad(x)
    close(loss, want)
    assert out.regularizers["t"].grad_norm is not None
    assert all(objective.plan is plain[0].plan for objective in plain)
    assert jr.RegularizerSpec(name="t", fn=make(), weight=1.0).on == "params"


def test_places_that_contradict():
    decay = R.WeightL2()
    with pytest.raises(ValueError, match="'decay': WeightL2 is a term on parameters.*leave on= out"):
        jr.RegularizerSpec(name="decay", fn=decay, weight=1.0, on="outputs")
    with pytest.raises(ValueError, match="'decay': WeightL2 is a term on parameters"):
        jr.compose(zero, [{"name": "decay", "fn": decay, "weight": 1.0, "on": "outputs"}], forward=outputs)
    with pytest.raises(ValueError, match="the base loss is of what forward gives, but WeightL2"):
        jr.compose(decay, forward=outputs)
    close(jr.compose(decay)({"w": 2 * jnp.ones(3)})[0], 12.0)
    plain = jr.RegularizerSpec(name="t", fn=zero, weight=1.0)
    assert plain.on == "outputs"
    with pytest.raises(ValueError, match="without it every term gets x.*leave on= out"):
        jr.compose(zero, [dataclasses.replace(plain, on="params")])


def test_logprobs_are_no_parameters():
    batch = jr.TokenBatch.from_arrays(mask=jnp.ones((2, 3), bool))
    objective = jr.compose(jr.losses.CrossEntropy(), [{"name": "decay", "fn": R.WeightL2(), "weight": 1.0}])
    with pytest.raises(ValueError, match="x has the shape of the batch's tokens.*forward=apply_fn"):
        objective.value_and_grad(-jnp.ones((2, 3)), batch)


def complex_model(params, batch):
    return jnp.fft.fft(params["w"] @ params["v"])


def spectrum(z, batch):
    return jnp.sum(jnp.abs(z) ** 2) + jnp.sum(jnp.real(z))


@pytest.mark.parametrize("track", [False, True, jr.GradNorms(wrt="outputs"), jr.GradNorms(params="w")])
def test_complex_parameters_and_outputs(track):
    """Gradients are JAX's: the conjugate of the direction of steepest ascent."""
    x = {
        "w": jnp.asarray(matrix(0, complex_=True), jnp.complex64),
        "v": jnp.asarray(matrix(1)[:4, 0], jnp.float32),
    }
    terms = [
        {"name": "size", "fn": lambda z, b: jnp.sum(jnp.abs(z)), "weight": 0.5},
        {"name": "decay", "fn": R.WeightL2(), "weight": 0.1},
    ]
    objective = jr.compose(spectrum, terms, forward=complex_model, track_grad_norms=track)

    def by_hand(p):
        z = complex_model(p, None)
        squares = sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(p))
        return spectrum(z, None) + 0.5 * jnp.sum(jnp.abs(z)) + 0.1 * squares

    want, slopes = jax.value_and_grad(by_hand)(x)
    (loss, out), grads = objective.value_and_grad(x)
    close(loss, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, slopes)
    if not track:
        return

    def size(tree):
        return np.sqrt(
            sum((np.abs(np.asarray(leaf, np.complex128)) ** 2).sum() for leaf in jax.tree.leaves(tree))
        )

    if track is True or track.params:
        kept = (lambda g: g["w"]) if track is not True else (lambda g: g)
        base = jax.grad(lambda p: spectrum(complex_model(p, None), None))(x)
        decay = {k: 2 * v for k, v in x.items()}
        close(out.base_loss.grad_norm, size(kept(base)), rtol=1e-4)
        close(out.regularizers["decay"].grad_norm, size(kept(decay)), rtol=1e-4)
        close(out.total_grad_norm, size(kept(slopes)), rtol=1e-4)
    else:
        z = complex_model(x, None)
        close(out.base_loss.grad_norm, size(jax.grad(lambda z: spectrum(z, None))(z)), rtol=1e-4)
        close(out.regularizers["size"].grad_norm, np.sqrt(z.size), rtol=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_terms_of_complex_matrices(name):
    make, _, formula = TERMS[name]
    w = matrix(0, complex_=True)
    x = {"w": jnp.asarray(w, jnp.complex64)}
    (value, metrics), gradient = graded(make(), x)
    assert value.dtype == jnp.float32
    assert all(not jnp.iscomplexobj(m) for m in metrics.values())
    close(value, formula(w))
    direction = matrix(1, complex_=True)
    got = np.real(np.asarray(gradient["w"], np.complex128) * direction).sum()
    close(got, slope(formula, w, direction), rtol=1e-4, atol=1e-4)


def test_what_is_meaningless_of_complex_numbers_is_refused():
    z = jnp.ones((2, 3)) * (1 + 1j)
    with pytest.raises(TypeError, match="Fisher diagonal is of real numbers"):
        R.EWC(reference={"w": z}, fisher={"w": z})({"w": z}, None)
    with pytest.raises(TypeError, match="complex"):
        jr.compose(jr.losses.CrossEntropy()).value_and_grad(z, {})
    with pytest.raises(TypeError, match="a real floating-point number, got dtype complex64"):
        jr.compose(lambda x, b: jnp.sum(x)).value_and_grad(z)
    with pytest.raises(TypeError, match="at 'n', has dtype int32"):
        jr.compose(lambda x, b: jnp.sum(jnp.abs(x["w"]))).value_and_grad({"w": z, "n": jnp.arange(2)})
