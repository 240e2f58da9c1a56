"""Norms over the whole range of float32, against float64 NumPy: every space, every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr
from jaxreg.base.norm import _in_float64, _in_three_ranges, l2_norm

TINY = float(np.finfo(np.float32).tiny)  # what is smaller may count as 0
SCALES = [
    1e-36,
    1e-30,
    1e-25,
    1e-21,
    1e-19,
    1e-12,
    1e-9,
    1e-3,
    1.0,
    1e5,
    1e9,
    1e12,
    1e18,
    1e19,
    1e21,
    1e25,
    1e30,
    1e36,
]
WAYS = {"in float64": _in_float64, "in three ranges": _in_three_ranges}


def gradients(scale, shape=(4, 33), dtype=np.float32):
    values = (scale * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    return np.where(np.abs(values) < TINY, 0, values).astype(dtype)


def norm(values, axis=None):
    """In float64, which holds the square of every float32 number."""
    return np.sqrt((np.abs(np.asarray(values, np.complex128)) ** 2).sum(axis))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("way", WAYS)
def test_both_ways_of_summing_squares(way, scale):
    values = gradients(scale)
    close(jax.jit(functools.partial(WAYS[way], False))((values,)) / scale, norm(values) / scale)
    close(jax.jit(functools.partial(WAYS[way], True))((values,)) / scale, norm(values, 1) / scale)


@pytest.mark.parametrize("way", WAYS)
def test_mixed_scales_zeros_and_what_is_not_finite(way):
    def of(*values):
        return float(WAYS[way](False, (np.array(values, np.float32),)))

    for big in SCALES:
        close(of(big, big / 3, 0.0, TINY) / big, norm([1, 1 / 3, TINY / big]))
    assert of(0.0, 0.0) == 0.0
    assert of(3e38, 1.0) == pytest.approx(3e38)
    assert of(TINY) == pytest.approx(TINY)
    assert of(np.inf, 1.0) == np.inf
    assert np.isnan(of(np.nan, 1.0))
    assert np.isnan(of(np.nan, np.inf))
    many = np.full(1 << 16, 1e-20, np.float32)
    assert float(WAYS[way](False, (many,))) == pytest.approx(2.56e-18, rel=1e-5)
    assert float(WAYS[way](False, (np.append(many, 1e15).astype(np.float32),))) == pytest.approx(1e15)


@pytest.mark.parametrize("scale", [*SCALES, 3e37])
def test_the_derivative_of_a_norm_is_the_direction(scale):
    values = gradients(scale)[:1]
    got = jax.jit(jax.grad(lambda v: l2_norm([v])))(values)
    close(got, values.astype(np.float64) / norm(values))
    assert not np.asarray(jax.grad(lambda v: l2_norm([v]))(np.zeros(3, np.float32))).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
def test_narrow_gradients_have_wide_norms(dtype, scale):
    x = jnp.asarray(gradients(scale), dtype)
    got = l2_norm([x])
    assert got.dtype == jnp.float32
    close(got / scale, norm(np.asarray(x, np.float64)) / scale)


def test_complex_leaves_beside_real_ones():
    close(l2_norm([jnp.array([3 + 4j]) * 1e25, jnp.array([12e25])]) / 1e25, 13.0)


def test_float64_beyond_float32(x64):
    for scale in (1e-300, 1e-200, 1.0, 1e200, 1e300):
        close(l2_norm([scale * jnp.array([3.0, 4.0])]) / scale, 5.0, rtol=1e-14)


def linear(x, batch):
    """Its gradient is batch["g"], whatever x is."""
    return jnp.sum(x * batch["g"])


def second(x, batch):
    return jnp.sum(x * batch["h"])


def objective(forward=None, **norms):
    terms = [jr.RegularizerSpec(name="second", fn=second, weight=0.5)]
    return jr.compose(linear, terms, forward=forward, track_grad_norms=jr.GradNorms(**norms))


def scaled(params, batch):
    """A model whose gradient has the scale of its factor."""
    return params["w"] * batch["factor"]


def check(out, g, h, scale, per_datum=False):
    close(out.base_loss.grad_norm / scale, norm(g) / scale)
    term = out.regularizers["second"]
    close(term.grad_norm / scale, norm(h) / scale)
    close(term.grad_norm_weighted / scale, 0.5 * norm(h) / scale)
    close(out.total_grad_norm / scale, norm(g.astype(np.float64) + 0.5 * h) / scale)
    if per_datum:
        close(out.base_loss.grad_norm_per_datum / scale, norm(g, 1) / scale)
        close(term.grad_norm_per_datum / scale, norm(h, 1) / scale)


@pytest.mark.parametrize("scale", SCALES)
def test_norms_of_the_outputs_gradient(scale):
    g, h = gradients(scale), gradients(scale)[::-1]
    batch = {"g": g, "h": h, "factor": np.float32(1)}
    x = jnp.ones(g.shape)
    (_, out), _ = objective(per_datum=True).value_and_grad(x, batch)
    check(out, g, h, scale, per_datum=True)
    (_, out), _ = objective(scaled, wrt="outputs", per_datum=True).value_and_grad({"w": x}, batch)
    check(out, g, h, scale, per_datum=True)


@pytest.mark.parametrize("scale", [1e-34, *SCALES[1:]])  # half of 1e-36 times a little is below TINY
def test_norms_of_the_params_gradient(scale):
    half = 10 ** (np.log10(scale) / 2)
    g, h = gradients(half), gradients(half)[::-1]
    batch = {"g": g, "h": h, "factor": np.float32(half)}
    (_, out), grads = objective(scaled, wrt="params").value_and_grad({"w": jnp.ones(g.shape)}, batch)
    g, h = (np.asarray(jnp.asarray(a) * np.float32(half)) for a in (g, h))  # as the model has it, in float32
    check(out, g, h, scale)
    close(np.asarray(grads["w"]) / scale, (g.astype(np.float64) + 0.5 * h) / scale)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("norms", [{"per_datum": True}, {"wrt": "params"}])
def test_inside_vmap_scan_and_grad(norms, scale):
    model = scaled if "wrt" in norms else None
    of = objective(model, **norms)
    g, h = gradients(scale), gradients(scale)[::-1]
    batch = {"g": g, "h": h, "factor": np.float32(1)}
    x = jnp.ones((3, *g.shape))
    params = {"w": x} if model else x

    def report(p):
        return of.value_and_grad(p, batch)[0][1]

    stacks = [jax.vmap(report)(params), jax.jit(jax.vmap(report))(params)]
    stacks.append(jax.lax.scan(lambda c, p: (c, report(p)), 0, params)[1])
    for stack in stacks:
        for k in range(3):
            check(jax.tree.map(lambda a, k=k: a[k], stack), g, h, scale)

    # A gradient through the pass, of what needs no norm, and of a norm itself (0: it does not depend on x).
    one = jax.tree.map(lambda a: a[0], params)
    slopes = jax.grad(lambda p: of.value_and_grad(p, batch)[0][0])(one)
    close(np.asarray(jax.tree.leaves(slopes)[0]) / scale, (g.astype(np.float64) + 0.5 * h) / scale)
    slopes = jax.jit(jax.grad(lambda p: report(p).total_grad_norm))(one)
    assert not np.asarray(jax.tree.leaves(slopes)[0]).any()


def test_what_is_not_finite_stays_so():
    for bad in (np.nan, np.inf):
        batch = {"g": np.array([1.0, bad], np.float32), "h": np.ones(2, np.float32)}
        (_, out), _ = objective().value_and_grad(jnp.ones(2), batch)
        assert not np.isfinite(out.base_loss.grad_norm)
        assert not np.isfinite(out.total_grad_norm)
        close(out.regularizers["second"].grad_norm, np.sqrt(2))


def test_a_norm_costs_no_further_pass():
    """Beside the sum of squares in float32; a further pass would double the bytes that the program moves.

    Where XLA writes the squares out (jax 0.10.1 does), float64 ones are twice as large: 5 to 3 in all.
    """
    x = jnp.ones((64, 512))

    def moved(fn):
        return jax.jit(fn).lower(x).compile().cost_analysis()["bytes accessed"]

    squares = moved(lambda x: jnp.sqrt(jnp.sum(jnp.sum(jnp.square(x), axis=1))))
    written_out = squares > 2 * x.nbytes
    assert moved(lambda x: l2_norm([x])) <= (1.7 if written_out else 1.01) * squares


def test_a_backward_that_cannot_be_vmapped_names_what_helps():
    @jax.custom_vjp
    def host(x):
        return 2 * x

    def backward(_, cotangent):
        like = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)
        return (jax.pure_callback(lambda c: np.asarray(2 * c), like, cotangent),)

    host.defvjp(lambda x: (host(x), None), backward)

    def model(params, batch):
        return host(params)

    batch = {"g": jnp.ones(3), "h": jnp.ones(3)}
    with pytest.raises(Exception, match="vmap") as caught:
        objective(model, wrt="params").value_and_grad(jnp.ones(3), batch)
    assert any("GradNorms(wrt='outputs')" in note for note in caught.value.__notes__)
    (_, out), grads = objective(model, wrt="outputs").value_and_grad(jnp.ones(3), batch)
    close(out.total_grad_norm, 1.5 * np.sqrt(3))
    close(grads, 3 * np.ones(3))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("number", [0.0, 1e-30, 1e30])
def test_of_one_number_in_many_places(number, x64):
    """What XLA knows to be one number it may square together with its scale, which is 0·∞."""
    with jax.enable_x64(x64):
        dtype = jnp.result_type(float)
        parts = jax.jit(lambda n: _in_three_ranges(False, (jnp.zeros(5, dtype), jnp.broadcast_to(n, (3, 4)))))
        close(parts(jnp.asarray(number, dtype)), number * np.sqrt(12), rtol=1e-6)
