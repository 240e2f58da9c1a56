"""forward= takes Flax linen params, NNX modules and Equinox pytrees alike."""

import zlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close

import jaxreg as jr

eqx = pytest.importorskip("equinox")

FEATURES, CLASSES = 5, 7


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(nn.tanh(nn.Dense(8)(x))))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.body, self.norm = nnx.Linear(FEATURES, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.1, deterministic=True), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(nnx.tanh(self.body(x)))))


class Equinox(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear
    name: str = "a static leaf"

    def __init__(self, key):
        self.body, self.head = (
            eqx.nn.Linear(FEATURES, 8, key=key),
            eqx.nn.Linear(8, CLASSES, key=jax.random.fold_in(key, 1)),
        )

    def __call__(self, x):
        return jax.vmap(jax.vmap(lambda v: self.head(jnp.tanh(self.body(v)))))(x)


def linen():
    model = Linen()
    params = model.init(jax.random.key(0), jnp.zeros((1, 1, FEATURES)))
    return params, lambda params, batch: model.apply(params, batch["features"]), "params/head"


def nnx_model():
    graph, params = nnx.split(NNX(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, batch: nnx.merge(graph, params)(batch["features"]), "head"


def equinox_model():
    params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_inexact_array)
    return params, lambda params, batch: eqx.combine(params, static)(batch["features"]), "head"


@pytest.mark.parametrize("make", [linen, nnx_model, equinox_model])
@pytest.mark.parametrize("wrt", ["params", "outputs", "head"])
def test_training_with_every_framework(make, wrt, rng):
    params, forward, head = make()
    batch = jr.TokenBatch.from_arrays(
        features=rng.normal(size=(4, 6, FEATURES)).astype(np.float32),
        target_tokens=rng.integers(0, CLASSES, (4, 6)),
    )
    start = jax.tree.map(jnp.copy, params)
    track = jr.GradNorms(params=head) if wrt == "head" else jr.GradNorms(wrt=wrt)
    objective = jr.compose(
        jr.losses.CrossEntropy(inputs="logits", reduction="token_mean"),
        [
            jr.RegularizerSpec(name="z", fn=jr.regularizers.ZLoss(), weight=1e-3),
            jr.RegularizerSpec(name="sp", fn=jr.regularizers.L2SP(reference=start), weight=1e-3, on="params"),
        ],
        forward=forward,
        track_grad_norms=track,
    )

    def by_hand(params):
        z = forward(params, batch)
        logp = jax.nn.log_softmax(z)
        nll = -jnp.take_along_axis(logp, batch["target_tokens"][..., None], -1).mean()
        away = sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))
        return nll + 1e-3 * (jax.nn.logsumexp(z, -1) ** 2).mean() + 1e-3 * away

    (loss, out), grads = objective.value_and_grad(params, batch)
    want, want_grads = jax.value_and_grad(by_hand)(params)
    close(loss, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-4, atol=1e-6)
    assert float(out.base_loss.grad_norm) > 0

    tx = optax.adam(0.03)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        (_, out), grads = objective.value_and_grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, out

    for _ in range(30):
        params, opt_state, out = step(params, opt_state)
    assert float(out.loss_total) < 0.9 * float(loss)


def test_an_nnx_module_as_it_is_says_how_to_split_it():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.drop = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.linear(x))

    objective = jr.compose(lambda z, b: jnp.sum(z), forward=lambda model, x: model(x))
    with pytest.raises(TypeError, match=r"nnx\.split"):
        objective.value_and_grad(Noisy(nnx.Rngs(0)), jnp.ones((1, 2)))


def test_dropout_gets_its_key():
    def forward(params, batch, *, key):
        return params * jax.random.bernoulli(key, 0.5, params.shape)

    objective = jr.compose(lambda z, b: jnp.sum(z), forward=forward)
    one, two = (objective.value_and_grad(jnp.ones(64), key=jax.random.key(s))[1] for s in (0, 1))
    assert not np.array_equal(one, two)
    with pytest.raises(ValueError, match="forward: it asks for a random key"):
        objective.value_and_grad(jnp.ones(64))


def test_keys_are_the_calls_folded_with_the_name_whatever_else_there_is():
    def draw(name):
        return jax.random.normal(jax.random.fold_in(jax.random.key(3), zlib.crc32(name) & 0x7FFFFFFF))

    def noisy(x, batch, *, key):
        return jax.random.normal(key) + 0 * jnp.sum(x)

    def forward(params, batch, *, key):
        return params + jax.random.normal(key)

    terms = [dict(name="noise", fn=noisy, weight=1.0)]
    for some in (terms, [dict(name="other", fn=noisy, weight=1.0), *terms]):
        for base, want in ((lambda z, b: jnp.sum(z), draw(b"/forward")), (noisy, draw(b"base_loss"))):
            objective = jr.compose(base, some, forward=forward)
            _, out = objective(jnp.zeros(1), key=jax.random.key(3))
            close(out.base_loss.value, want)
            close(out.regularizers["noise"].value, draw(b"noise"))
