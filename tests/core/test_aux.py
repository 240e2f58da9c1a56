"""What a model returns beside its outputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 1.0]])}
X = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]])


def model(params, batch):
    hidden = batch["x"] @ params["w"]
    aux = {"mean": hidden.mean(0), "seen": batch["seen"] + hidden.shape[0], "cache": (batch["x"] > 0,)}
    return jnp.tanh(hidden), aux


BATCH = {"x": X, "seen": jnp.array(7, jnp.int32)}
NORMS = [False, True, jr.GradNorms(wrt="outputs"), jr.GradNorms(wrt="params", params="w")]


def composed(norms=False, forward=model, **more):
    return jr.compose(
        lambda y, batch: jnp.mean(y**2),
        [dict(name="l1", fn=lambda y, batch: jnp.mean(jnp.abs(y)), weight=0.1)],
        forward=forward,
        track_grad_norms=norms,
        **more,
    )


@pytest.mark.parametrize("norms", NORMS)
def test_aux_comes_back_and_has_no_gradient(norms):
    (loss, out), gradient = composed(norms, has_aux=True).value_and_grad(PARAMS, BATCH)
    (right, _), slope = composed(norms, forward=lambda p, b: model(p, b)[0]).value_and_grad(PARAMS, BATCH)
    np.testing.assert_allclose(loss, right)
    chex.assert_trees_all_close(gradient, slope)
    chex.assert_trees_all_equal(out.aux, model(PARAMS, BATCH)[1])
    assert out.aux["seen"].dtype == jnp.int32
    assert out.aux["cache"][0].dtype == bool


def test_it_goes_through_jit_vmap_scan_and_grad():
    objective = composed(has_aux=True)
    _, out = jax.jit(objective)(PARAMS, BATCH)
    chex.assert_trees_all_close(out.aux, model(PARAMS, BATCH)[1], rtol=1e-6)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BATCH)
    _, out = jax.vmap(objective, in_axes=(None, 0))(PARAMS, many)
    chex.assert_shape(out.aux["mean"], (2, 2))

    def step(seen, _):
        _, out = objective(PARAMS, BATCH | {"seen": seen})
        return out.aux["seen"], out.loss_total

    seen, _ = jax.lax.scan(step, BATCH["seen"], length=4)
    assert seen == 7 + 4 * 3
    (_, out), _ = jax.value_and_grad(objective, has_aux=True)(PARAMS, BATCH)
    assert out.aux["seen"] == 10


def test_it_is_no_metric():
    _, out = composed(has_aux=True)(PARAMS, BATCH)
    assert out.on_host().aux is None
    assert not any("mean" in name for name in out.to_flat_dict())


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="has_aux=True says what forward returns; give compose the model"):
        jr.compose(lambda x, batch: jnp.sum(x), has_aux=True)
    with pytest.raises(TypeError, match=r"forward: with has_aux=True it returns \(outputs, aux\), got"):
        composed(forward=lambda p, b: model(p, b)[0], has_aux=True)(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"has_aux=True\): they come back in out.aux"):
        jr.compose(lambda y, batch: jnp.sum(y["y"]), forward=lambda p, b: {"y": p["w"], "n": b["seen"]})(
            PARAMS, BATCH
        )
