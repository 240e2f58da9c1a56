"""What several test files share: a few terms, and gradients that are not ours."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr


def nll(x, batch):
    return -batch.mean(x), {"lowest": jnp.min(x)}


def l1(x, batch):
    return batch.mean(jnp.abs(x))


def l2(x, batch):
    return batch.mean(jnp.square(x)), {"rms": jnp.sqrt(batch.mean(jnp.square(x)))}


def drift(x, batch):
    return batch.sum(jnp.expm1(x - batch["ref"]))


TERMS = {"l1": l1, "l2": l2, "drift": drift}


def specs(**weights):
    return [jr.RegularizerSpec(name=n, fn=TERMS[n], weight=w) for n, w in weights.items()]


def token_batch(rng, lengths=(5, 3, 7), **extra):
    data = [{"ref": -rng.uniform(0.1, 3, n), **{k: f(n) for k, f in extra.items()}} for n in lengths]
    return jr.TokenBatch.pack(data, length_buckets=[8, 16], row_buckets=[4])


def logprobs(rng, batch):
    return jnp.asarray(-rng.uniform(0.1, 3, batch.shape), jnp.float32)


def norm(tree):
    return np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))


def close(got, want, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol, atol)
