"""Burgers' equation for the PINN examples: the network, the loss and its two conditions, the exact solution.

``uₜ + u·uₓ = ν·uₓₓ`` for x from -1 to 1 and t from 0 to 1, with ``u(x, 0) = -sin(πx)`` and ``u(±1, t) = 0``;
a steep front forms at x = 0.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

VISCOSITY = 0.1 / np.pi
WIDTHS = (2, 32, 32, 32, 1)
Points = dict[str, jax.Array]


def first_params(seed: int) -> list[dict[str, jax.Array]]:
    """A network's params, drawn as Glorot and Bengio (2010) have it."""
    rng = np.random.default_rng(seed)
    layers = []
    for ins, outs in itertools.pairwise(WIDTHS):
        w = rng.normal(scale=np.sqrt(2 / (ins + outs)), size=(ins, outs))
        layers.append({"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros(outs)})
    return layers


def drawn(seed: int, inside: int = 1024, edge: int = 128) -> Points:
    """Where the equation [N, 2] and the conditions [M, 2] and [M] are asked for; a point is (x, t)."""
    rng = np.random.default_rng(seed)
    points = {
        "inside": np.stack([rng.uniform(-1, 1, inside), rng.uniform(0, 1, inside)], axis=1),
        "boundary": np.stack([rng.choice([-1.0, 1.0], edge), rng.uniform(0, 1, edge)], axis=1),
        "initial": np.stack([rng.uniform(-1, 1, edge), np.zeros(edge)], axis=1),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in points.items()}


def network(params: Any, point: jax.Array) -> jax.Array:
    """u at a point [2]."""
    hidden = point
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    return (hidden @ params[-1]["w"] + params[-1]["b"])[0]


def residual(params: Any, points: Points) -> jax.Array:
    """The base loss: how far the equation is from holding, squared."""

    def at(point: jax.Array) -> jax.Array:
        u, (u_x, u_t) = jax.value_and_grad(network, argnums=1)(params, point)
        along_x = jnp.array([1.0, 0.0])
        _, (u_xx, _) = jax.jvp(lambda p: jax.grad(network, argnums=1)(params, p), (point,), (along_x,))
        return u_t + u * u_x - VISCOSITY * u_xx

    return jnp.mean(jnp.square(jax.vmap(at)(points["inside"])))


def boundary(params: Any, points: Points) -> jax.Array:
    """u is 0 at both ends."""
    return jnp.mean(jnp.square(_everywhere(params, points["boundary"])))


def initial(params: Any, points: Points) -> jax.Array:
    """u is a sine in the beginning."""
    wanted = -jnp.sin(jnp.pi * points["initial"][:, 0])
    return jnp.mean(jnp.square(_everywhere(params, points["initial"]) - wanted))


def compose(weighting: Any = None, norms: Any = False) -> jr.CompositeLoss:
    """The residual, and the two conditions as terms of weight 1."""
    return jr.compose(
        residual,
        [
            jr.RegularizerSpec(name="boundary", fn=boundary, weight=1.0),
            jr.RegularizerSpec(name="initial", fn=initial, weight=1.0),
        ],
        weighting=weighting,
        track_grad_norms=norms,
    )


def exact(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The solution [T, X] by Cole and Hopf's transformation, integrated by Gauss and Hermite's rule."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    shift = np.sqrt(4 * VISCOSITY * t)[:, None, None] * nodes
    y = x[None, :, None] - shift
    # The exponent is at most 1 / (2πν) = 5: nothing overflows.
    kernel = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return np.asarray(-np.sum(np.sin(np.pi * y) * kernel, axis=-1) / np.sum(kernel, axis=-1))


def grid(across: int = 201, times: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Where solutions are compared: x [X] and t [T]."""
    return np.linspace(-1, 1, across), np.linspace(0, 1, times)


def solution(params: Any, x: np.ndarray, t: np.ndarray) -> jax.Array:
    """The network's u on a grid [T, X]."""
    points = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(t)), axis=-1)
    return jax.vmap(jax.vmap(lambda point: network(params, point)))(points)


def error(params: Any) -> jax.Array:
    """Relative L2 error against the exact solution on the grid."""
    x, t = grid()
    want = jnp.asarray(exact(x, t))
    return jnp.linalg.norm(solution(params, x, t) - want) / jnp.linalg.norm(want)


def _everywhere(params: Any, points: jax.Array) -> jax.Array:
    return jax.vmap(lambda point: network(params, point))(points)
