"""What several test files share: a few terms, and gradients that are not ours."""

import functools

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


def graded(term, x, batch=None):
    """``((value, metrics), gradient)`` of a built-in term: one program; eagerly each operation is one."""
    leaves, treedef = jax.tree.flatten(term)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    others = tuple(None if i in arrays else leaf for i, leaf in enumerate(leaves))
    return _graded(treedef, others, arrays, x, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _graded(treedef, others, arrays, x, batch):
    term = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(others)])
    return jax.value_and_grad(term, has_aux=True)(x, batch)


def norm(tree):
    return np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))


def close(got, want, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol, atol)
