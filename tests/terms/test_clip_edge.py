"""On a clip's edge the gradient is the whole one of the unclipped side, and never half of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import jaxreg as jr

L, R = jr.losses, jr.regularizers
EDGES = [(0.8, 1.2), (1.0, 1.2), (0.8, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("a", [1.0, -2.0])
@pytest.mark.parametrize(("low", "high"), EDGES)
@pytest.mark.parametrize("make", [L.PPO, L.GSPO])
def test_on_policy_it_is_the_policy_gradient(make, low, high, a):
    x = jnp.array([[-1.0, -0.3]])
    arrays = {"logprobs": x, "advantages": jnp.full((1, 2), a)}
    term = make(low=low, high=high, reduction="token_sum")
    for grad in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        close(grad(lambda x: term(x, arrays)[0])(x), [[-a, -a]])
    assert float(term(x, arrays)[1]["clip_fraction"]) == 0


def test_a_dual_clip_at_the_ratio_itself():
    c = float(jnp.exp(jnp.float32(0.5)))
    arrays = {"logprobs": jnp.array([[-1.5]]), "advantages": jnp.array([[-1.0]])}
    slope = jax.grad(lambda x: L.PPO(dual_clip=c)(x, arrays)[0])(jnp.array([[-1.0]]))
    close(slope, [[c]])


@pytest.mark.parametrize(("d", "a"), [*itertools.product([-1.0, -0.1, 0.0, 0.1, 1.0], [-1.5, 0.0, 1.5])])
def test_ppo_is_the_formula_off_the_edge_too(d, a):
    r = np.exp(d)
    plain, clipped = r * a, np.clip(r, 0.8, 1.2) * a
    arrays = {"logprobs": jnp.array([[-2.0 - d]]), "advantages": jnp.array([[a]])}
    value, slope = jax.value_and_grad(lambda x: L.PPO()(x, arrays)[0])(jnp.array([[-2.0]]))
    close(value, -min(plain, clipped))
    close(slope, [[-r * a if plain <= clipped else 0.0]])


@pytest.mark.parametrize("r", [2.0, 4.0, 10.0])
@pytest.mark.parametrize("a", [-1.0, 2.0])
def test_dual_clip_is_the_formula(r, a):
    arrays = {"logprobs": jnp.array([[-3.0 - np.log(r)]], jnp.float32), "advantages": jnp.array([[a]])}
    (value, metrics), slope = jax.value_and_grad(L.PPO(dual_clip=3.0), has_aux=True)(
        jnp.array([[-3.0]]), arrays
    )
    inner = min(r * a, np.clip(r, 0.8, 1.2) * a)
    close(value, -(max(inner, 3.0 * a) if a < 0 else inner))
    close(slope, [[-r * a if a < 0 and r < 3 else 0.0]])
    assert float(metrics["dual_clip_fraction"]) == float(a < 0 and r > 3)
    with pytest.raises(ValueError, match="dual_clip is a number above 1"):
        L.PPO(dual_clip=0.5)


def test_l2_on_the_edge_of_its_clip():
    slope = jax.grad(lambda x: R.L2(clip=2.0, reduction="token_sum")(x, {})[0])(
        jnp.array([[2.0, -2.0, 2.5, 1.0]])
    )
    close(slope, [[4.0, -4.0, 0.0, 2.0]])


def test_unlikelihood_at_its_floor_and_focal_at_certainty():
    at = jnp.log1p(-jnp.float32(0.5))[None, None]  # 1 − p is the floor itself
    slope = jax.grad(lambda x: R.Unlikelihood(floor=0.5)(x, {})[0])(at)
    close(slope, [[1.0]])
    close(jax.grad(lambda x: R.Focal(gamma=1.0)(x, {})[0])(jnp.zeros((1, 1))), [[0.0]])
